#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0, CPU, 2026-12-01.
#
# Guess:  Trainer(optimizers=(optimizer, None)) steps with that optimizer, also under DeepSpeed, or
#         refuses it, as it does under FSDP.
# Seen:   with TrainingArguments(deepspeed=...) it is put away without a word, and AdamW of the
#         arguments (learning_rate, weight_decay) is made in its place. DeepSpeed itself takes the
#         optimizer that deepspeed.initialize is given.
# So:     learning rates by group, another optimiser, weight decay for some parameters only: all gone,
#         and only the losses show it. What TrainingArguments can say (optim=) is kept; else override
#         create_optimizer of the Trainer.
#
# Output seen:
#   without DeepSpeed: SGD, one step of SGD with 0.25: True
#   with DeepSpeed: AdamW, one step of SGD with 0.25: False, warnings: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5 setuptools wheel
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu HF_HOME="$work/home" HF_HUB_OFFLINE=1
# Its build asks for torch.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation \
    deepspeed==0.19.8

cat > "$work/script.py" <<'SCRIPT'
import sys
import warnings

import accelerate
import deepspeed
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

assert transformers.__version__ == "5.24.0", transformers.__version__
assert accelerate.__version__ == "1.15.0", accelerate.__version__
assert deepspeed.__version__ == "0.19.8", deepspeed.__version__
folder, with_deepspeed = sys.argv[1], sys.argv[2] == "yes"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).sum()}


stages = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        max_grad_norm=0, disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
        deepspeed=stages if with_deepspeed else None,
    )
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    rows = [{"x": torch.tensor([3.0, 5.0]), "labels": 0}]
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
used = trainer.optimizer
while hasattr(used, "optimizer"):
    used = used.optimizer
right = torch.tensor([1.0 - 0.25 * 3.0, 2.0 - 0.25 * 5.0])
said = [str(one.message) for one in seen if "ptimizer" in str(one.message)]
print(type(used).__name__ + ", one step of SGD with 0.25:", torch.allclose(model.weight, right),
      file=sys.stderr, end="")
if with_deepspeed:
    print(", warnings:", len(said), file=sys.stderr, end="")
SCRIPT

run() {
    MASTER_ADDR=127.0.0.1 MASTER_PORT=29677 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 \
        "$work/venv/bin/python" "$work/script.py" "$work/out" "$1" 2>"$work/log" >/dev/null \
        || { cat "$work/log"; exit 1; }
    grep -o "[A-Za-z]*, one step of SGD with 0.25: .*" "$work/log"
}

{
    echo "without DeepSpeed: $(run no)"
    echo "with DeepSpeed: $(run yes)"
} | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
without DeepSpeed: SGD, one step of SGD with 0.25: True
with DeepSpeed: AdamW, one step of SGD with 0.25: False, warnings: 0
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
