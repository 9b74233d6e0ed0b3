#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  get_peft_model casts what it trains in a bf16 model to fp32 (autocast_adapter_dtype=True is
#         its default), so a classifier's head, which task_type="SEQ_CLS" adds to modules_to_save,
#         learns at any learning rate that LoRA learns at.
# Seen:   LoRA's matrices are fp32, the head stays in bf16. AdamW's steps of 1e-5 are rounded away:
#         after 50 of them four in five of the head's weights have the bits that they were drawn
#         with, while LoRA's B has moved everywhere. In fp32 every weight of the head moves.
# So:     the fresh head of a fine-tuned classifier is its initial noise, and nothing is reported.
#
# Output seen:
#   bf16 model: lora_B is float32 and 100% of it moved, the head is bfloat16 and under a quarter of it moved
#   fp32 model: lora_B is float32 and 100% of it moved, the head is float32 and 100% of it moved
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import peft
import torch
import transformers

assert peft.__version__ == "0.21.2", peft.__version__
transformers.utils.logging.set_verbosity_error()


def run(name, dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=64, num_labels=4, pad_token_id=0,
    )
    base = transformers.LlamaForSequenceClassification(config).to(dtype)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, lora).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    (head,) = [p for n, p in trained.items() if "score" in n]
    b = next(p for n, p in trained.items() if "lora_B" in n)
    before = {id(p): p.detach().clone() for p in (head, b)}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0.0)
    ids, labels = torch.randint(1, 64, (8, 12)), torch.arange(8) % 4
    for _ in range(50):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def moved(p):
        return float((p.detach() != before[id(p)]).float().mean())

    def called(p):
        return str(p.dtype).removeprefix("torch.")

    share = "under a quarter" if 0 < moved(head) < 0.25 else f"{moved(head):.0%}"
    print(
        f"{name} model: lora_B is {called(b)} and {moved(b):.0%} of it moved,",
        f"the head is {called(head)} and {share} of it moved",
    )


run("bf16", torch.bfloat16)
run("fp32", torch.float32)
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }

cat > "$work/expected" <<'EXPECTED'
bf16 model: lora_B is float32 and 100% of it moved, the head is bfloat16 and under a quarter of it moved
fp32 model: lora_B is float32 and 100% of it moved, the head is float32 and 100% of it moved
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
