#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0 and torch 2.13.0, CPU, 2026-11-30; 5.17.0 does the same.
#
# Guess:  Trainer.train(resume_from_checkpoint=DIR) continues with the weights that Trainer itself
#         wrote to DIR, for any model class of transformers, or it raises.
# Seen:   save_pretrained() writes a nemotron_h model under the names of its original checkpoints
#         (backbone.*), which from_pretrained() renames back. Trainer resumes by load_state_dict()
#         with strict=False, which renames nothing: no decoder layer of the file fits, all of them
#         stay as they were drawn, and only lm_head is restored. One warning is logged; training
#         goes on at the saved step with the saved optimiser moments.
# So:     a run of such a model that was interrupted continues from random weights.
#
# Output seen:
#   names in the file that the model has: 1 of 21
#   after resuming, parameters equal to those saved: mamba2 21 of 21, nemotron_h 1 of 21
#   the same file by from_pretrained(): 21 of 21
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import logging
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch
import transformers
from safetensors.torch import load_file

transformers.utils.logging.set_verbosity(logging.CRITICAL)
root = sys.argv[1]
common = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, n_groups=1, chunk_size=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
configs = {
    "mamba2": transformers.Mamba2Config(
        **common, state_size=8, num_heads=4, head_dim=16, tie_word_embeddings=False
    ),
    "nemotron_h": transformers.NemotronHConfig(
        **common, layers_block_type=["mamba", "mamba"], ssm_state_size=8, mamba_num_heads=4,
        mamba_head_dim=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        tie_word_embeddings=False,
    ),
}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(8) + index
        return {"input_ids": ids, "labels": ids}


def trainer(name, seed, steps):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configs[name])
    # Nothing changes in training, so what is restored can be compared value by value.
    arguments = transformers.TrainingArguments(
        f"{root}/{name}", max_steps=steps, save_steps=1, learning_rate=0.0, report_to=[],
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, logging_strategy="no",
    )
    return transformers.Trainer(model, arguments, train_dataset=Rows())


def equal(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return f"{sum(torch.equal(a, b) for a, b in pairs)} of {len(list(one.parameters()))}"


lines = {}
for name in configs:
    first = trainer(name, seed=0, steps=1)
    # Every parameter is drawn, so that none is equal in two models because both start at 1.
    for parameter in first.model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    first.train()
    again = trainer(name, seed=1, steps=2)
    again.train(resume_from_checkpoint=f"{root}/{name}/checkpoint-1")
    lines[name] = equal(first.model, again.model)
file = load_file(f"{root}/nemotron_h/checkpoint-1/model.safetensors")
names = set(dict(first.model.named_parameters()))
print(f"names in the file that the model has: {len(names & set(file))} of {len(file)}")
print("after resuming, parameters equal to those saved:", ", ".join(f"{n} {v}" for n, v in lines.items()))
loaded = transformers.AutoModelForCausalLM.from_pretrained(f"{root}/nemotron_h/checkpoint-1")
print("the same file by from_pretrained():", equal(first.model, loaded))
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" "$work" 2>"$work/log" | grep -v '^{' | tee "$work/seen" || { cat "$work/log"; exit 1; }

cat > "$work/expected" <<'EXPECTED'
names in the file that the model has: 1 of 21
after resuming, parameters equal to those saved: mamba2 21 of 21, nemotron_h 1 of 21
the same file by from_pretrained(): 21 of 21
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
