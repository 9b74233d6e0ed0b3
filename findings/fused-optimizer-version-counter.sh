#!/usr/bin/env bash
# torch 2.13.0, CPU, 2026-11-30.
#
# Guess:  an optimiser's step changes its parameters in place, so it raises their version counters,
#         and autograd refuses a backward through a graph that was recorded before the step ("one of
#         the variables needed for gradient computation has been modified by an inplace
#         operation"), whichever implementation of the optimiser runs.
# Seen:   AdamW's loop and foreach implementations do. fused=True changes the values and leaves the
#         counter where it was: the same backward is accepted, and gives a gradient of the new
#         values, which no function that was evaluated has.
# So:     code that tells by the version counter that a weight has changed (a cached product of an
#         adapter's weights, say) keeps the old one after a fused step, and a wrong order of step
#         and backward goes unseen in trainers whose default is the fused optimiser.
#
# Output seen:
#   for-loop: counter 0 -> 1, backward through the old graph: RuntimeError
#   foreach: counter 0 -> 1, backward through the old graph: RuntimeError
#   fused: counter 0 -> 0, backward through the old graph: gradient 1.8, where 2.0 is right
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import torch

for name, options in {"for-loop": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, **options)
    loss = (weight * weight).sum()  # its gradient, 2 · weight, needs the weight of now
    weight.grad = torch.ones(3)
    before = weight._version
    optimizer.step()
    after, weight.grad = weight._version, None
    try:
        loss.backward()
        outcome = f"gradient {weight.grad[0]:.1f}, where 2.0 is right"
    except RuntimeError as error:
        outcome = type(error).__name__
    print(f"{name}: counter {before} -> {after}, backward through the old graph: {outcome}")
CHECK
"${PY:-$work/venv/bin/python}" "$work/check.py" 2>/dev/null | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
for-loop: counter 0 -> 1, backward through the old graph: RuntimeError
foreach: counter 0 -> 1, backward through the old graph: RuntimeError
fused: counter 0 -> 0, backward through the old graph: gradient 1.8, where 2.0 is right
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
