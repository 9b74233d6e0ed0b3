#!/usr/bin/env bash
# torch 2.11.0 (CUDA 13.0), NVIDIA H200, 2026-11-30. Needs an NVIDIA GPU.
#
# Guess:  a module captured by torch.cuda.make_graphed_callables() trains as the module does: its
#         parameters' gradients add up over two backward passes (gradient accumulation), and a
#         gradient that was read before stays what it was.
# Seen:   the replayed backward hands autograd its own static buffers. With .grad None before, as
#         after zero_grad(set_to_none=True), the default, AccumulateGrad takes the buffer itself
#         for .grad; the next replay writes into it and is then added to itself. Of two
#         micro-batches the second counts twice and the first is gone. No error, no warning; with
#         zero_grad(set_to_none=False), or a clone in a hook, the sum is right.
# So:     captured blocks in a loop with gradient accumulation train on other gradients.
#
# Output seen:
#   two micro-batches, .grad None before: the sum of both: False, twice the second: True
#   two micro-batches, .grad zero before: the sum of both: True
#   a gradient kept from the first backward is unchanged after the second: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON_WITH_TORCH:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy
    python=$work/venv/bin/python
fi

cat > "$work/check.py" <<'CHECK'
import torch

assert torch.__version__.startswith("2.11.0"), torch.__version__
first, second = (torch.randn(8, 16, device="cuda") for _ in range(2))


def gradients(*batches, captured, to_none=True):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 4).cuda()
    if captured:
        layer = torch.cuda.make_graphed_callables(layer, (torch.randn(8, 16, device="cuda"),))
    layer.zero_grad(set_to_none=to_none)
    if not to_none:
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
    kept = []
    for batch in batches:
        layer(batch).square().sum().backward()
        kept.append(layer.weight.grad)
    return kept[0], kept[-1]


def same(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


_, both = gradients(first, second, captured=False)
_, twice = gradients(second, second, captured=False)
_, seen = gradients(first, second, captured=True)
print("two micro-batches, .grad None before: the sum of both:", same(seen, both), end="")
print(", twice the second:", same(seen, twice))
_, seen = gradients(first, second, captured=True, to_none=False)
print("two micro-batches, .grad zero before: the sum of both:", same(seen, both))

torch.manual_seed(0)
layer = torch.cuda.make_graphed_callables(
    torch.nn.Linear(16, 4).cuda(), (torch.randn(8, 16, device="cuda"),)
)
layer(first).square().sum().backward()
held, copied = layer.weight.grad, layer.weight.grad.clone()
layer.zero_grad(set_to_none=True)
layer(second).square().sum().backward()
print("a gradient kept from the first backward is unchanged after the second:", same(held, copied))
CHECK
"$python" "$work/check.py" | tee "$work/seen"

cat > "$work/expected" <<'EXPECTED'
two micro-batches, .grad None before: the sum of both: False, twice the second: True
two micro-batches, .grad zero before: the sum of both: True
a gradient kept from the first backward is unchanged after the second: False
EXPECTED
diff "$work/expected" "$work/seen" && echo "still so"
