#!/usr/bin/env bash
# peft 0.19.1 with transformers 5.24.0 and torch 2.13.0, CPU, 2026-11-30; mended in peft 0.20.0.
#
# Guess:  transformers' model.load_adapter(DIR) gives the model that PeftModel.from_pretrained()
#         gives for the same directory, or it raises.
# Seen:   the conversion of names that the two share expects a model whose names begin with
#         "model.". Mamba's begin with "backbone.": no tensor of the file fits, the adapter is made
#         and keeps the numbers that it was drawn with. Nothing is raised; a log line says so.
# So:     an adapter of a Mamba is served untrained. With LoRA's own initial values (B = 0) it is
#         the base model that answers, which looks like an adapter that learnt nothing.
#
# Output seen:
#   llama: PeftModel.from_pretrained() as trained: True, model.load_adapter() as trained: True
#   mamba2: PeftModel.from_pretrained() as trained: True, model.load_adapter() as trained: False
#   mamba2, load_adapter: the base model's own logits: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 peft==0.19.1 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import logging
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import peft
import torch
import transformers

assert peft.__version__ == "0.19.1", peft.__version__
transformers.utils.logging.set_verbosity(logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()
configs = {
    "llama": transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48,
    ),
    "mamba2": transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16,
        n_groups=1, chunk_size=8,
    ),
}
targets = {"llama": ["q_proj"], "mamba2": ["in_proj"]}


def base(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[name]).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(9)[None]).logits


for name in configs:
    folder = f"{sys.argv[1]}/{name}"
    trained = peft.get_peft_model(base(name), peft.LoraConfig(r=4, target_modules=targets[name]))
    for key, parameter in trained.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)  # as training would have left it
    expected = logits(trained.eval())
    trained.save_pretrained(folder)
    by_peft = logits(peft.PeftModel.from_pretrained(base(name), folder).eval())
    model = base(name)
    model.load_adapter(folder)
    by_transformers = logits(model.eval())
    print(
        f"{name}: PeftModel.from_pretrained() as trained: {torch.allclose(by_peft, expected)},",
        f"model.load_adapter() as trained: {torch.allclose(by_transformers, expected)}",
    )
print("mamba2, load_adapter: the base model's own logits:", torch.allclose(by_transformers, logits(base("mamba2"))))
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" "$work" 2>"$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }

cat > "$work/expected" <<'EXPECTED'
llama: PeftModel.from_pretrained() as trained: True, model.load_adapter() as trained: True
mamba2: PeftModel.from_pretrained() as trained: True, model.load_adapter() as trained: False
mamba2, load_adapter: the base model's own logits: True
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
