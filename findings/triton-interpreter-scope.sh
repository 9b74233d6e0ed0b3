#!/usr/bin/env bash
# triton 3.9.0 with torch 2.13.0, CPU, TRITON_INTERPRET=1 against triton.compile for sm_90, 2026-12-01.
#
# Guess:  a kernel whose tests pass under Triton's interpreter is one that the compiler takes.
# Seen:   names in a loop follow Python under the interpreter and another rule in the compiler. A name
#         that is first assigned inside a loop does not exist behind it ("is not defined"), and one
#         that is assigned before a loop must keep shape and dtype inside it: even "_", by which a
#         tuple's other parts are thrown away.
# So:     a kernel that is tested under the interpreter is compiled for a device in a test, too.
#
# Output seen:
#   last: interpreter [6.0, 7.0], compiler: NameError('total is not defined')
#   thrown: interpreter [12.0, 15.0], compiler: Loop-carried variable _ has initial type <['2'], fp32> but is re-assigned to fp32
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 triton==3.9.0 numpy==2.3.5

cat > "$work/check.py" <<'CHECK'
import os
import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def last(x_ptr, y_ptr, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    for i in range(count):
        total = tl.load(x_ptr + i * SIZE + at)
    tl.store(y_ptr + at, total)


@triton.jit
def both(x_ptr, at):
    return tl.load(x_ptr + at), tl.load(x_ptr)


@triton.jit
def thrown(x_ptr, y_ptr, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    _, first = both(x_ptr, at)
    total = tl.zeros([SIZE], tl.float32) + first
    for i in range(1, count):
        more, _ = both(x_ptr + i * SIZE, at)
        total += more
    tl.store(y_ptr + at, total)


def refusal(kernel):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "count": "i32", "SIZE": "constexpr"}
    source = ASTSource(kernel, signature, constexprs={(3,): 2})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except triton.CompilationError as error:
        return re.sub(r'^AssertionError\("|\s*in loop!.*$', "", str(error).strip().splitlines()[-1])
    return "taken"


for kernel in (last, thrown):
    if os.environ.get("TRITON_INTERPRET") == "1":
        y = torch.empty(2)
        kernel[(1,)](torch.arange(8.0), y, 4, SIZE=2)
        print(y.tolist())
    else:
        print(refusal(kernel))
CHECK
interpreted=$(TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/check.py")
compiled=$("$work/venv/bin/python" -W ignore "$work/check.py")
names=(last thrown)
for i in 0 1; do
    echo "${names[i]}: interpreter $(sed -n $((i + 1))p <<<"$interpreted"), compiler: $(sed -n $((i + 1))p <<<"$compiled")"
done
[[ $interpreted == $'[6.0, 7.0]\n[12.0, 15.0]' ]]
grep -q "total is not defined" <<<"$compiled"
grep -q "Loop-carried variable _" <<<"$compiled"
