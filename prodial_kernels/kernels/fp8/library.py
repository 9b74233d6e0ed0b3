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

# What products reach on an H200, in FLOP/s, and a pass over Y in bytes a second (2026-12-01): the
# own one and the pipelined one with all terms, cuBLAS's without.
_OWN, _PIPELINED, _LIBRARY, _BANDWIDTH = 790e12, 1030e12, 1220e12, 3.7e12

# The newest Triton whose Gluon is known, which changes from release to release.
_NEWEST_GLUON = (3, 9)

# The padded rank up to which the pipelined product adds a low-rank one: more takes its registers.
_MOST_PIPELINED = 32


def takes_library(m: int, n: int, k: int, limits: DeviceLimits, *, finish: bool) -> bool:
    """Whether Y [m, n] of operands with k columns is cuBLAS's product rather than the own one.

    ``finish``: a pass over Y comes after it, which the own product does without.
    """
    if not _has_library(m, n, k, limits):
        return False
    return _library_spares(m, n, k, _OWN, finish=finish) > 0


def takes_pipelined(
    m: int, n: int, k: int, limits: DeviceLimits, *, finish: bool, r_pad: int = 16
) -> bool:
    """Whether it is the product of ``pipelined.py``, rather than any other.

    ``finish`` as in :func:`takes_library`, ``r_pad`` the padded rank of what is added.
    """
    whole = not n % GROUP and pipelined_unroll(k) and r_pad <= _MOST_PIPELINED
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    # Of fewer tiles than multiprocessors the own product makes twice as many.
    tiles = ceil_div(m, GROUP) * (n // GROUP)
    if version > _NEWEST_GLUON or limits.capability != (9, 0) or not whole:
        return False
    if tiles < limits.processors:
        return False
    if not _has_library(m, n, k, limits):
        return True
    return _library_spares(m, n, k, _PIPELINED, finish=finish) < 0


def pipelined_unroll(k: int) -> int:
    """How many groups of k columns the pipelined product multiplies without a gap; 0 for never."""
    if k % GROUP:
        return 0
    return next((unroll for unroll in (8, 6, 4) if k // GROUP % unroll == 0), 0)


def _has_library(m: int, n: int, k: int, limits: DeviceLimits) -> bool:
    """Whether cuBLAS has the product: on Hopper, from CUDA 12.9 on, of whole blocks."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if limits.capability != (9, 0) or version < (12, 9) or not m:
        return False
    return not (m % 4 or n % GROUP or k % GROUP)


def _library_spares(m: int, n: int, k: int, rate: float, *, finish: bool) -> float:
    """Seconds that cuBLAS's product and a pass over Y take less than one of ``rate`` FLOP/s."""
    pass_over_y = 4.0 * m * n / _BANDWIDTH if finish else 0.0
    return 2.0 * m * n * k * (1 / rate - 1 / _LIBRARY) - pass_over_y


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
