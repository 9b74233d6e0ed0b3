#!/usr/bin/env bash
# triton 3.6.0 and 3.9.0, compiled for sm_90 without a GPU, 2026-12-01.
#
# Guess:  where a constexpr may stand, a field of a constexpr named tuple may stand: tl.arange(0, TILE.rows)
#         takes it in both versions.
# Seen:   triton 3.6.0 refuses the same field in the shape of tl.zeros, "'int' object has no attribute
#         'type'", where 3.9.0 and the interpreter take it. Named first (ROWS: tl.constexpr = TILE.rows) it is
#         taken by both: a tuple's items are values of the kernel to 3.6.0, and a bare int is none.
# So:     fields of such tuples are named before they are part of a shape; and what a kernel's tests pass under
#         one version of the compiler says nothing of another.
#
# Output seen:
#   triton 3.6.0: field: AttributeError("'int' object has no attribute 'type'")
#   triton 3.6.0: named: taken
#   triton 3.9.0: field: taken
#   triton 3.9.0: named: taken
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
for version in 3.6.0 3.9.0; do
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        --target "$work/$version" "triton==$version"
done

cat > "$work/check.py" <<'CHECK'
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Tile(NamedTuple):
    rows: int


@triton.jit
def field(y_ptr, TILE: tl.constexpr):
    zero = tl.zeros((TILE.rows, 4), tl.float32)
    tl.store(y_ptr + tl.arange(0, TILE.rows)[:, None] * 4 + tl.arange(0, 4)[None, :], zero)


@triton.jit
def named(y_ptr, TILE: tl.constexpr):
    ROWS: tl.constexpr = TILE.rows
    zero = tl.zeros((ROWS, 4), tl.float32)
    tl.store(y_ptr + tl.arange(0, TILE.rows)[:, None] * 4 + tl.arange(0, 4)[None, :], zero)


for kernel in (field, named):
    source = ASTSource(kernel, {"y_ptr": "*fp32", "TILE": "constexpr"}, constexprs={(1,): Tile(8)})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        found = "taken"
    except triton.CompilationError as error:
        found = str(error).strip().splitlines()[-1]
    print(f"triton {triton.__version__}: {kernel.__name__}: {found}")
CHECK
found=$(for version in 3.6.0 3.9.0; do
    PYTHONPATH="$work/$version" TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore "$work/check.py"
done)
echo "$found"
[[ $found == "triton 3.6.0: field: AttributeError(\"'int' object has no attribute 'type'\")
triton 3.6.0: named: taken
triton 3.9.0: field: taken
triton 3.9.0: named: taken" ]]
