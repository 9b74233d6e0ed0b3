"""cuBLAS's product of matrices in fp8 by blocks, where there is one; what else belongs to Y."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.fp8.quantize import GROUP, Rounded
from prodial_kernels.kernels.replay.recorder import launch

# What the own product takes less than cuBLAS's and a pass over Y, in TFLOP/s and bytes a
# nanosecond on an H200: 880 against 1,180, and 4,200 (2026-11-30).
_OWN, _LIBRARY, _BANDWIDTH = 880e12, 1180e12, 4.2e12


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


class FinishTile(NamedTuple):
    """Compile-time sizes of ``_finish_kernel``: a tile of Y, R_PAD."""

    block_m: int
    block_n: int
    rank: int


@triton.jit
def _finish_kernel(
    y_ptr, deviation_ptr, low_ptr, outer_ptr, bias_ptr, M, N, R, alpha, TILE: tl.constexpr
):  # fmt: skip
    """Y = s ⊙ Y (+ L (α B)ᵀ) (+ bias) in place, [M, N]; L [M, R_PAD], B [N, R].

    A program owns a tile.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    R_PAD: tl.constexpr = TILE.rank
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = offs_m.to(tl.int64)[:, None]
    mask = mask_m[:, None] & mask_n[None, :]
    at = y_ptr + rows * N + offs_n[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if deviation_ptr is not None:
        deviation = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y *= 1 + deviation[None, :]
    if outer_ptr is not None:
        for r in tl.static_range(0, R_PAD, 16):
            offs_r = r + tl.arange(0, 16)
            low = tl.load(low_ptr + rows * R_PAD + offs_r[None, :], mask=mask_m[:, None], other=0.0)
            b = tl.load(
                outer_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :],
                mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0,
            )  # fmt: skip
            y = tl.dot(low, (b.to(tl.float32) * alpha).to(low.dtype).T, y)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_finish(
    y: Tensor,
    low: Tensor | None,
    scale_deviation: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    alpha: float,
) -> tuple[()]:
    """Y = s ⊙ Y + L (α B)ᵀ + bias in place, of what there is; shapes as in the kernel."""
    m, n = y.shape
    block_m, block_n = 64, 128
    r_pad = 16 if low is None else low.shape[1]
    launch(
        _finish_kernel, (ceil_div(m, block_m) * ceil_div(n, block_n),),
        y_ptr=y, deviation_ptr=scale_deviation, low_ptr=low, outer_ptr=lora_b, bias_ptr=bias,
        M=m, N=n, R=0 if lora_b is None else lora_b.shape[1], alpha=alpha,
        TILE=FinishTile(block_m, block_n, r_pad), num_warps=4,
    )  # fmt: skip
    return ()
