#!/usr/bin/env bash
# triton 3.9.0 with torch 2.13.0, CPU, TRITON_INTERPRET=1, 2026-11-30.
#
# Guess:  under Triton's interpreter .to(tl.float8e4nv) rounds as the device's instruction and
#         torch's .to(torch.float8_e4m3fn) do, to the nearest value, so that a kernel that
#         quantises can be tested without a GPU.
# Seen:   a mantissa that is rounded up to the next power of two loses its carry: the value comes out
#         half as large. Ties go up instead of to even, and NaN becomes a number.
# So:     kernels whose results are compared under the interpreter make the bits by integers there.
#
# Output seen:
#   31.6: interpreter 16.0, torch 32.0
#   100.0: interpreter 104.0, torch 96.0
#   nan: interpreter 384.0, torch nan
#   of 2048 values from 1 to 448, off by half: 24; other ties: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 triton==3.9.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.float8e4nv))


def both(x):
    y = torch.empty(len(x), dtype=torch.float8_e4m3fn)
    convert[(1,)](x, y, SIZE=len(x))
    return y.float(), x.to(torch.float8_e4m3fn).float()


found, exact = both(torch.tensor([31.6, 100.0, float("nan"), 1.0]))
for value, ours, theirs in zip((31.6, 100.0, float("nan")), found, exact):
    print(f"{value}: interpreter {ours.item()}, torch {theirs.item()}")
assert found.tolist()[:3] == [16.0, 104.0, 384.0]
assert exact.tolist()[:2] == [32.0, 96.0] and exact[2].isnan()
values = torch.linspace(1, 448, 2048)
found, exact = both(values)
half = found * 2 == exact
print(f"of 2048 values from 1 to 448, off by half: {half.sum()}; other ties: {(found != exact)[~half].sum()}")
assert half.any()
CHECK
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/check.py"
