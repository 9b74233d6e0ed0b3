"""cuBLAS's product of matrices in fp8 by blocks, where there is one; what else belongs to Y."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div, split_tokens
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.fp8.quantize import GROUP, Rounded
from prodial_kernels.kernels.projector.tiles import (
    WalkTile,
    load_low_rank,
    load_tile,
    store_tile,
    tiled,
    tma_ready,
)
from prodial_kernels.kernels.replay.recorder import launch

# What the own product takes less than cuBLAS's and a pass over Y, in TFLOP/s and bytes a
# nanosecond on an H200: 790 against 1,220, and 3,700 (2026-11-30).
_OWN, _LIBRARY, _BANDWIDTH = 790e12, 1220e12, 3.7e12


def takes_library(m: int, n: int, k: int, limits: DeviceLimits, *, finish: bool) -> bool:
    """Whether Y [m, n] of operands with k columns is cuBLAS's product.

    It has this one on Hopper, from CUDA 12.9 on, and for sizes that its blocks divide.
    ``finish``: a pass over Y comes after it, which the own product does without.
    """
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if limits.capability != (9, 0) or version < (12, 9) or not m:
        return False
    if m % 4 or n % GROUP or k % GROUP:
        return False
    pass_over_y = 4.0 * m * n / _BANDWIDTH if finish else 0.0
    return 2.0 * m * n * k * (1 / _OWN - 1 / _LIBRARY) > pass_over_y


def library_product(x: Rounded, codes: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Return X V [M, N] in ``dtype``, rounded once: X as rounded, ``codes`` Vᵀ [N, K].

    ``scale_inv`` [N / 128, K / 128], or with further columns up to a multiple of 4.
    """
    m, k = x.codes.shape
    # Scales of X column by column, those of V with a multiple of 4 along K.
    scales = scale_inv if scale_inv.shape[1] % 4 == 0 else F.pad(scale_inv, (0, -k // GROUP % 4))
    return F.scaled_mm(
        x.codes, codes.t(), x.scales[:, :m].t(), F.ScalingType.BlockWise1x128, scales.t(),
        F.ScalingType.BlockWise128x128, output_dtype=dtype,
    )  # fmt: skip


@triton.jit
def _finish_kernel(
    y, deviation_ptr, low_ptr, outer_ptr, bias_ptr, M, N, R, alpha, rows_per_program,
    TMA: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Y = s ⊙ Y (+ L (α B)ᵀ) (+ bias) in place, [M, N]; L [M, R_PAD], B [N, R].

    A program walks BLOCK_N columns of ``rows_per_program`` rows.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    R_PAD: tl.constexpr = TILE.rank
    columns = tl.cdiv(N, BLOCK_N)
    column = tl.program_id(0) % columns * BLOCK_N
    first = tl.program_id(0) // columns * rows_per_program
    offs_n = column + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R_PAD)
    mask_n = offs_n < N
    if deviation_ptr is not None:
        s = 1 + tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if outer_ptr is not None:
        dtype: tl.constexpr = low_ptr.dtype.element_ty
        b = load_low_rank(outer_ptr, offs_n, offs_r, N, R, alpha, dtype, False).T
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    stop = tl.minimum(first + rows_per_program, M)
    # Only an explicit number of stages makes the compiler prefetch what no dot reads.
    for row in tl.range(first, stop, BLOCK_M, num_stages=TILE.stages):
        tile = load_tile(y, 0, row, column, M, N, N, 0, BLOCK_M, BLOCK_N, False, TMA)
        wide = tile.to(tl.float32)
        if deviation_ptr is not None:
            wide *= s[None, :]
        if outer_ptr is not None:
            offs_m = row + tl.arange(0, BLOCK_M)
            low = tl.load(
                low_ptr + offs_m.to(tl.int64)[:, None] * R_PAD + offs_r[None, :],
                mask=(offs_m < M)[:, None], other=0.0,
            )  # fmt: skip
            # [BLOCK_M, R_PAD] @ [R_PAD, BLOCK_N] -> [BLOCK_M, BLOCK_N]
            wide += tl.dot(low, b)
        if bias_ptr is not None:
            wide += bias[None, :]
        store_tile(y, 0, row, column, M, N, N, 0, wide.to(tile.dtype), BLOCK_M, BLOCK_N, False, TMA)


def launch_finish(
    y: Tensor,
    low: Tensor | None,
    scale_deviation: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    alpha: float,
) -> tuple[()]:
    """Y = s ⊙ Y + L (α B)ᵀ + bias in place, of what there is; Y contiguous, shapes as above."""
    m, n = y.shape
    r_pad = 16 if low is None else low.shape[1]
    tma = tma_ready(y)
    # Addresses take the registers that a wide tile would.
    block_m, block_n = 64 if r_pad <= 64 else 32, 128 if tma else 64
    columns = ceil_div(n, block_n)
    # Two programs for each multiprocessor of a Hopper.
    splits, rows = split_tokens(m, columns, block_m, 264)
    launch(
        _finish_kernel, (columns * splits,),
        y=tiled(y, [block_m, block_n], tma), deviation_ptr=scale_deviation, low_ptr=low,
        outer_ptr=lora_b, bias_ptr=bias, M=m, N=n, R=0 if lora_b is None else lora_b.shape[1],
        alpha=alpha, rows_per_program=rows, TMA=tma,
        TILE=WalkTile(block_m, block_n, r_pad, 3 if r_pad <= 64 else 2), num_warps=4,
    )  # fmt: skip
    return ()
