"""Compiles the cross-entropy kernel without a GPU; fails where it would be slow or too large."""

from __future__ import annotations

import sys

import torch

from prodial_kernels.kernels.cross_entropy import cross_entropy_
from support.kernels.compile_kernels import check_all, ptx_of
from support.kernels.compile_launches import broken_rules, cost_of
from support.kernels.launch_recorder import Launch

# Words, and the distance of rows: aligned both, the rows alone, a single warp.
SHAPES = ((50_304, 50_304), (50_277, 50_304), (48, 64))
# At least two programs on a multiprocessor, whose threads share 65,536 registers. For a third of 16
# warps, on sm_100, ptxas spills two registers outside the loops.
REGISTERS, PROGRAMS, SPILLED = 65_536, 2, 8


def record(dtype: torch.dtype, shape: tuple[int, int]) -> None:
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
    if cost.registers * 32 * launch.options["num_warps"] * PROGRAMS > REGISTERS:
        found.append(f"{cost.registers} registers")
    vocabulary, _ = launch.origin[1]
    if found or vocabulary < launch.constants["BLOCK"]:
        return found
    ptx = ptx_of(launch)
    for access in ["ld.global", *(["st.global"] if launch.constants["GRADIENT"] else [])]:
        if not any(access in line and ".v4.b32" in line for line in ptx):
            found.append(f"no {access} of 16 bytes")
    return found


if __name__ == "__main__":
    sys.exit(
        check_all(record, problems, dtypes=(torch.bfloat16, torch.float32), shapes=SHAPES, each=2)
    )
