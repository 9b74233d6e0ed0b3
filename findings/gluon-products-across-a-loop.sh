#!/usr/bin/env bash
# triton 3.6.0 (its Gluon and its ptxas), no GPU, compiled for sm_90a, 2026-12-01.
#
# Guess:  two products of a warp group are under way at a time if warpgroup_mma(..., is_async=True) begins
#         one and warpgroup_mma_wait(1, ...) leaves the newest alone: the one before is read meanwhile.
# Seen:   where one is under way across the end of a loop, ptxas lets every product of the kernel wait for
#         its end at once, so that none overlaps. It says so to whoever runs it with -v (C7514, C7515);
#         triton.compile says nothing, the PTX still asks for "wait_group 1", and results are right.
#         Within a pass of an unrolled loop, with a wait for all at its end, they overlap as written.
# So:     pipelined products are unrolled and end with a wait for all; a test runs ptxas -v on them.
#
# Output seen:
#   within the loop: waits asked for ['1', '0'], serialized: no
#   across the loop's end: waits asked for ['1', '1', '0'], serialized: ['(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.6.0

cat > "$work/check.py" <<'CHECK'
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def kernel(x_ptr, scale_ptr, y_ptr, pairs, ACROSS: gl.constexpr):
    """The sum of products, each scaled: two registers' worth of them take turns."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, FLAT))[None, :]
    a = gl.allocate_shared_memory(gl.float16, [64, 64], TILE, gl.load(x_ptr + row * 64 + column))
    fence_async_shared()
    acc = gl.zeros([64, 64], gl.float32, SUMS)
    even = gl.zeros([64, 64], gl.float32, SUMS)
    odd = gl.zeros([64, 64], gl.float32, SUMS)
    if ACROSS:
        # One product is always under way, across the loop's end too.
        first = warpgroup_mma(a, a, even, use_acc=False, is_async=True)
        for i in range(pairs):
            second = warpgroup_mma(a, a, odd, use_acc=False, is_async=True)
            even = warpgroup_mma_wait(1, (first,))
            acc += even * gl.load(scale_ptr + 2 * i)
            first = warpgroup_mma(a, a, even, use_acc=False, is_async=True)
            odd = warpgroup_mma_wait(1, (second,))
            acc += odd * gl.load(scale_ptr + 2 * i + 1)
        even = warpgroup_mma_wait(0, (first,))
    else:
        for i in range(pairs):
            first = warpgroup_mma(a, a, even, use_acc=False, is_async=True)
            second = warpgroup_mma(a, a, odd, use_acc=False, is_async=True)
            even = warpgroup_mma_wait(1, (first,))
            acc += even * gl.load(scale_ptr + 2 * i)
            odd = warpgroup_mma_wait(0, (second,))
            acc += odd * gl.load(scale_ptr + 2 * i + 1)
    rows = gl.arange(0, 64, gl.SliceLayout(1, SUMS))[:, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(y_ptr + rows * 64 + columns, acc)


serialized = {}
for across in (False, True):
    types = {"x_ptr": "*fp16", "scale_ptr": "*fp32", "y_ptr": "*fp32", "pairs": "i32", "ACROSS": "constexpr"}
    source = GluonASTSource(kernel, types, {"ACROSS": across})
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    waits = re.findall(r"wgmma.wait_group.sync.aligned\s+(\d)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr
    serialized[across] = re.findall(r"\(C\d+\).*serialized", said)
    where = "across the loop's end" if across else "within the loop"
    print(f"{where}: waits asked for {waits}, serialized: {serialized[across] or 'no'}")
assert not serialized[False]
assert serialized[True]
CHECK
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore "$work/check.py"
