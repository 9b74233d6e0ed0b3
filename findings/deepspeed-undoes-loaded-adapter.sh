#!/usr/bin/env bash
# deepspeed 0.19.8 with peft 0.21.2 and torch 2.13.0, CPU, one process, 2026-12-01.
#
# Guess:  an adapter that is loaded into a model whose optimiser DeepSpeed holds (ZeRO-1, fp32, no
#         mixed precision) is where training goes on from, as with any optimiser: the parameters
#         are what the engine's forward computes with.
# Seen:   forward computes with the loaded values until the next step, which writes the values from
#         before the load over them: in fp32 too the optimiser trains copies, made when the engine
#         was. A step of learning rate 0 takes the load back. Nothing is said of it, and the first
#         loss after the load is the loaded adapter's.
# So:     PEFT's set_peft_model_state_dict (load_adapter calls it) belongs before
#         deepspeed.initialize; afterwards each value has to be set by
#         deepspeed.utils.safe_set_full_fp32_param as well.
#
# Output seen:
#   loaded into the model: 2.0
#   after a step of rate 0: 1.0
#   ... loaded with safe_set_full_fp32_param: 2.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5 \
    setuptools==80.9.0 wheel ninja py-cpuinfo psutil
# Its operators are built when they are used; none is.
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu HF_HOME="$work/home" PATH="$work/venv/bin:$PATH"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

cat > "$work/script.py" <<'SCRIPT'
import deepspeed
import peft
import torch
from deepspeed.utils import safe_set_full_fp32_param

assert (deepspeed.__version__, peft.__version__) == ("0.19.8", "0.21.2")
base = torch.nn.Sequential(torch.nn.Linear(4, 4))
model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
with torch.no_grad():
    for parameter in trained.values():
        parameter.fill_(1.0)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(trained.values(), lr=0.0),
    config={
        "train_batch_size": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
)
state = {name: torch.full_like(t, 2.0) for name, t in peft.get_peft_model_state_dict(model).items()}


def values() -> str:
    return ", ".join(sorted({str(v) for p in trained.values() for v in p.flatten().tolist()}))


def step() -> None:
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()


def show(text: str) -> None:
    with open("seen", "a") as file:
        print(text, file=file)


peft.set_peft_model_state_dict(model, state)
show(f"loaded into the model: {values()}")
step()
show(f"after a step of rate 0: {values()}")
peft.set_peft_model_state_dict(model, state)
for parameter in trained.values():
    safe_set_full_fp32_param(parameter, torch.full_like(parameter, 2.0))
step()
show(f"... loaded with safe_set_full_fp32_param: {values()}")
SCRIPT

cd "$work"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29571
python script.py > log 2>&1 || { cat log; exit 1; }
cat seen
cat > expected <<'EXPECTED'
loaded into the model: 2.0
after a step of rate 0: 1.0
... loaded with safe_set_full_fp32_param: 2.0
EXPECTED
diff expected seen && echo "still so"
