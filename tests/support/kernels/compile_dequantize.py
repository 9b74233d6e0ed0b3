"""Compiles the dequantising kernels without a GPU; fails where they would be slow or too large."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from prodial_kernels.kernels.dequantize import (
    dequantize_fp8,
    dequantize_int8,
    dequantize_nf4,
    dequantize_nf4_some,
)
from prodial_kernels.kernels.dequantize_groups import dequantize_groups
from support.kernels.compile_kernels import check_all, ptx_of
from support.kernels.compile_launches import broken_rules, cost_of
from support.kernels.launch_recorder import Launch

SHAPES = ((8192, 2048), (333, 257))


def record(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    n, k = shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    out = empty(n, k, dtype=dtype)
    blocks = -(-n * k // 64)
    codes = empty(-(-n * k // 2), 1, dtype=torch.uint8)
    nested = (empty(-(-blocks // 256)), empty(256), empty())
    for absmax, given in ((empty(blocks, dtype=torch.uint8), nested), (empty(blocks), None)):
        dequantize_nf4(
            codes, absmax, empty(16), given, out, shape=(n, k), dtype=dtype, blocksize=64,
            nested_blocksize=256,
        )  # fmt: skip
        dequantize_nf4_some(
            empty(2, *codes.shape, dtype=torch.uint8), empty(2, blocks, dtype=absmax.dtype),
            empty(2, 16),
            None if given is None else (empty(2, -(-blocks // 256)), empty(2, 256), empty(2)),
            empty(2, dtype=torch.int64), empty(2, n, k, dtype=dtype), blocksize=64,
            nested_blocksize=256,
        )  # fmt: skip
    dequantize_int8(empty(n, k, dtype=torch.int8), empty(n), None, dtype=dtype, step=1 / 127)
    tiles = [-(-size // 128) for size in (n, k)]
    dequantize_fp8(empty(n, k, dtype=torch.float8_e4m3fn), empty(*tiles), None, dtype=dtype)
    codes, scales = empty(n, -(-k // 2), dtype=torch.uint8), empty(n, -(-k // 128), dtype=dtype)
    for zeros, order in (
        (empty(*scales.shape, dtype=torch.uint8), None),
        (scales, empty(k, dtype=torch.int32)),
    ):
        dequantize_groups(
            codes, scales, zeros, order, None, dtype=dtype, k=k, width=4, columns=128, zero=0
        )


def problems(launch: Launch) -> list[str]:
    """What breaks a rule; where rows are aligned, also whatever is not a wide access."""
    found = broken_rules(cost_of(launch))
    aligned = launch.origin[1] == SHAPES[0]
    if found or not aligned:
        return found
    ptx = ptx_of(launch)
    stores = [line for line in ptx if "st.global" in line]
    if not stores or any(".v4.b32" not in line for line in stores):
        found.append(f"stores less than 16 bytes at once: {stores[:2]}")
    if any("fma.rn.f32" in line for line in ptx):
        found.append("a product and a sum with one rounding")
    return found


if __name__ == "__main__":
    sys.exit(
        check_all(record, problems, dtypes=(torch.bfloat16, torch.float16), shapes=SHAPES, each=8)
    )
