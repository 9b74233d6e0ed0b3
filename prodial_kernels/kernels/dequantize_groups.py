"""Integer codes with a scale and a zero point for each group, to a dense weight.

As in :mod:`prodial_kernels.kernels.dequantize`, the bits are those of the PyTorch code that defines
them, :class:`prodial_kernels.quantization.groups.layer.GroupedLinear`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.dequantize import SPAN, written
from prodial_kernels.kernels.replay.recorder import launch

# Columns that a program writes, of one group where groups allow it.
_WIDEST, _NARROWEST = 128, 16


@triton.jit
def _groups_kernel(
    codes_ptr, scales_ptr, zeros_ptr, order_ptr, out_ptr, N, K, BYTES, REPEATS, GROUPS,
    COLUMNS, ZERO, WIDTH: tl.constexpr, ZEROS: tl.constexpr, ROUND: tl.constexpr,
    ORDER: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W = (code − zero) · scale for BLOCK_N rows by BLOCK_K columns; W [N, K].

    codes [N, BYTES] uint8, of WIDTH bits each, the first in the lowest; scales and zeros
    [REPEATS, GROUPS], those of row n in row n mod REPEATS; without ZEROS, all are ZERO. A column is
    of group ORDER[k] int32, or else of k // COLUMNS; with ONE_GROUP a program's columns are of one.
    ROUND: the difference is rounded to the dtype of the scales.
    """
    PER_BYTE: tl.constexpr = 8 // WIDTH
    MASK: tl.constexpr = (1 << WIDTH) - 1
    across = tl.cdiv(K, BLOCK_K)
    pid_n, pid_k = tl.program_id(0) // across, tl.program_id(0) % across
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_b = pid_k * (BLOCK_K // PER_BYTE) + tl.arange(0, BLOCK_K // PER_BYTE)
    rows = offs_n < N
    at = offs_n.to(tl.int64)[:, None] * BYTES + offs_b[None, :]
    packed = tl.load(codes_ptr + at, mask=rows[:, None] & (offs_b < BYTES)[None, :], other=0)
    if WIDTH == 8:
        codes = packed
    elif WIDTH == 4:
        codes = tl.interleave(packed & MASK, packed >> 4)
    else:
        codes = tl.interleave(
            tl.interleave(packed & MASK, (packed >> 4) & MASK),
            tl.interleave((packed >> 2) & MASK, packed >> 6),
        )
    row = (offs_n % REPEATS).to(tl.int64) * GROUPS
    if ONE_GROUP:
        place = (row + pid_k * BLOCK_K // COLUMNS)[:, None]
        known = rows[:, None]
    else:
        if ORDER:
            group = tl.load(order_ptr + offs_k, mask=offs_k < K, other=0)
        else:
            group = offs_k // COLUMNS
        place = row[:, None] + group[None, :]
        known = rows[:, None] & (offs_k < K)[None, :]
    scale = tl.load(scales_ptr + place, mask=known, other=0)
    values = codes.to(tl.float32)
    if ZEROS:
        values -= tl.load(zeros_ptr + place, mask=known, other=0).to(tl.float32)
        if ROUND:
            values = values.to(scale.dtype).to(tl.float32)
    else:
        values -= ZERO
    w = values * scale.to(tl.float32)
    into = out_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(into, w.to(out_ptr.dtype.element_ty), mask=rows[:, None] & (offs_k < K)[None, :])


def dequantize_groups(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    out: Tensor | None,
    *,
    dtype: torch.dtype,
    k: int,
    width: int,
    columns: int,
    zero: int,
) -> Tensor:
    """Return the dense weight [N, ``k``]; the tensors are the kernel's.

    ``columns`` is how many a group has; ``zero`` the zero point of all where ``zeros`` is None.
    """
    options = (dtype, k, width, columns, zero)
    return written(_launch, (codes, scales, zeros, order), out, options)


def _launch(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype,
    k: int,
    width: int,
    columns: int,
    zero: int,
) -> tuple[Tensor]:
    n = len(codes)
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=codes.device)
    one_group = order is None and columns % _NARROWEST == 0
    block_k = _WIDEST
    while one_group and columns % block_k:
        block_k //= 2
    block_n = SPAN // block_k
    rounds = zeros is not None and zeros.is_floating_point() and scales.dtype != torch.float32
    launch(
        _groups_kernel, (ceil_div(n, block_n) * ceil_div(k, block_k),),
        codes_ptr=codes, scales_ptr=scales, zeros_ptr=zeros, order_ptr=order, out_ptr=out,
        N=n, K=k, BYTES=codes.shape[1], REPEATS=len(scales), GROUPS=scales.shape[1],
        COLUMNS=columns, ZERO=zero, WIDTH=width, ZEROS=zeros is not None, ROUND=rounds,
        ORDER=order is not None, ONE_GROUP=one_group, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return (out,)
