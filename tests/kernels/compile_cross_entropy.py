"""Compiles the cross-entropy kernel without a GPU; fails where it would be slow or too large."""

from __future__ import annotations

import itertools
import sys

import torch
import triton
from compile_launches import broken_rules, cost_of
from launch_recorder import DEVICES, Launch, Recorder
from triton.backends.compiler import GPUTarget

from prodial_kernels.kernels.cross_entropy import cross_entropy_

ARCHITECTURES = (80, 90, 100)
# Words, and the distance of rows: aligned both, the rows alone, a single warp.
SHAPES = ((50_304, 50_304), (50_277, 50_304), (48, 64))
# At least two programs of 16 warps on a multiprocessor. For a third, on sm_100, ptxas spills two
# registers outside the loops.
REGISTERS, SPILLED = 64, 8


def record(recorder: Recorder, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    vocabulary, stride = shape
    logits = torch.empty_strided((8, vocabulary), (stride, 1), dtype=dtype, device="cuda")
    targets = torch.empty(8, dtype=torch.int64, device="cuda")
    losses = torch.empty(8, device="cuda")
    for gradient in (True, False):
        cross_entropy_(logits, targets, losses, scale=1.0, ignored=-100, gradient=gradient)


def problems(launch: Launch) -> list[str]:
    """What breaks a rule; and loops without wide accesses."""
    cost = cost_of(launch)
    if cost.local <= SPILLED:
        cost.local = 0
    found = broken_rules(cost)
    if cost.registers > REGISTERS:
        found.append(f"{cost.registers} registers")
    vocabulary, _ = launch.origin[1]
    if found or vocabulary < launch.constants["BLOCK"]:
        return found
    target = GPUTarget("cuda", launch.device.arch, 32)
    ptx = triton.compile(launch.source, target=target, options=launch.options).asm["ptx"]
    for access in ["ld.global", *(["st.global"] if launch.constants["GRADIENT"] else [])]:
        if not any(access in line and ".v4.b32" in line for line in ptx.splitlines()):
            found.append(f"no {access} of 16 bytes")
    return found


def main() -> int:
    """Print every problem; 1 where there is one."""
    launches = []
    for arch, dtype, shape in itertools.product(
        ARCHITECTURES, (torch.bfloat16, torch.float32), SHAPES
    ):
        if arch != 90 and dtype is torch.float32:
            continue
        recorder = Recorder()
        recorder.origin = (dtype, shape)
        with recorder.on(DEVICES[arch]):
            record(recorder, dtype, shape)
        launches += recorder.launches
    expected = 2 * (len(ARCHITECTURES) + 1) * len(SHAPES)
    if len(launches) != expected:
        print(f"{len(launches)} launches were recorded, expected {expected}")
        return 1
    failed = 0
    for launch in launches:
        for problem in problems(launch):
            failed = 1
            print(f"{launch.title} {launch.origin}: {problem}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
