"""X ⊙ D, rounded to fp8 by token and 128 columns, and L = X I in the same pass."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.projector.low_rank import launch_low_rank_sum
from prodial_kernels.kernels.projector.operands import ProjectionOptions
from prodial_kernels.kernels.projector.tiles import (
    Diagonal,
    load_deviation,
    load_low_rank,
    partial_sums,
)
from prodial_kernels.kernels.replay.recorder import launch

# Columns that share a scale, and a side of the weight's tiles.
GROUP = 128


class Rounded(NamedTuple):
    """A matrix [M, K] in fp8: the value of an element is its code times its group's scale.

    Attributes:
        codes: [M, K] float8_e4m3fn, contiguous.
        scales: [⌈K / 128⌉, M rounded up to 4] fp32, powers of two; what lies beyond M is undefined.
    """

    codes: Tensor
    scales: Tensor


class QuantizeTile(NamedTuple):
    """Compile-time sizes of ``_quantize_kernel``: rows of a program, R_PAD, stages of its loop."""

    rows: int
    rank: int
    stages: int


@triton.jit
def round_group(tile, CONVERTS: tl.constexpr):
    """[ROWS, 128] in fp32 -> (codes in e4m3, scales [ROWS] in fp32); see ``ops/fp8.py``.

    A row of the group that is not finite has NaN for its scale. By integer arithmetic on the bits
    of the largest magnitude, so that every device and PyTorch agree to the bit. CONVERTS: the
    device's instruction makes the codes, as the interpreter's does not.
    """
    largest = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    # One exponent more where the mantissa is above that of 448.
    exponent = tl.maximum((tl.minimum(largest, 0x7F7FFFFF) + 0x1FFFFF) >> 23, 9)
    scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    inverse = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    # Not by element, which takes as long as the conversion.
    scale = tl.where(largest < 0x7F800000, scale, float("nan"))
    if CONVERTS:
        codes = (tile * inverse[:, None]).to(tl.float8e4nv)
    else:
        codes = _encoded(tile * inverse[:, None]).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return codes, scale


@triton.jit
def _encoded(value):
    """Magnitudes up to 448 in fp32 -> e4m3's bits, to the nearest, ties to even.

    Triton's interpreter loses the carry of a mantissa that is rounded up to the next power of two
    (triton 3.9.0: 31.7 becomes 16).
    """
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    # Three bits of mantissa remain, of an exponent that is biased by 7 instead of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 multiples of 2^-9: in the sum they are the last bits.
    multiples = (tl.abs(value) * 512 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(bits < (121 << 23), multiples, normal) | sign


@triton.jit
def _quantize_kernel(
    x_ptr, factor_ptr, inner_ptr, codes_ptr, scale_ptr, low_ptr,
    M, K, R, alpha, stride_x, stride_scale,
    TRANSPOSED: tl.constexpr, DIAGONAL: tl.constexpr, GROUP: tl.constexpr, CONVERTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of X ⊙ D, and L = X I, where that is asked for.

    X, codes [M, K], scales [⌈K / GROUP⌉, stride_scale], L [M, R_PAD]; D, [K], is read as DIAGONAL
    says and 1 where None; I = Aᵀ with A [R, K] where TRANSPOSED, else α B with B [K, R].
    A program owns TILE.rows rows; where several share them, each takes some of the groups of
    columns, and of L [shares, M, R_PAD] a part.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    R_PAD: tl.constexpr = TILE.rank
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R_PAD)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = offs_m < M
    acc = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
    groups = tl.cdiv(K, GROUP)
    for group in tl.range(tl.program_id(1), groups, tl.num_programs(1), num_stages=TILE.stages):
        offs_k = group * GROUP + tl.arange(0, GROUP)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + rows * stride_x + offs_k[None, :], mask=mask, other=0.0)
        wide = x.to(tl.float32)
        if factor_ptr is not None:
            # Rounded once: 16 bits in between would take as long as the conversion.
            wide *= 1 + load_deviation(factor_ptr, offs_k, offs_k, K, DIAGONAL)[None, :]
        codes, scale = round_group(wide, CONVERTS)
        tl.store(codes_ptr + rows * K + offs_k[None, :], codes, mask=mask)
        tl.store(scale_ptr + group * stride_scale + offs_m, scale, mask=mask_m)
        if low_ptr is not None:
            # [BLOCK_M, GROUP] @ [GROUP, R_PAD] -> [BLOCK_M, R_PAD]
            inner = load_low_rank(inner_ptr, offs_k, offs_r, K, R, alpha, x.dtype, TRANSPOSED)
            acc = tl.dot(x, inner, acc)
    if low_ptr is not None:
        target = low_ptr + tl.program_id(1).to(tl.int64) * M * R_PAD
        tl.store(
            target + rows * R_PAD + offs_r[None, :], acc.to(low_ptr.dtype.element_ty),
            mask=mask_m[:, None],
        )  # fmt: skip


def launch_quantize(
    x: Tensor,
    *,
    factor: Tensor | None = None,
    relu: bool = False,
    inner: Tensor | None = None,
    transposed: bool = True,
    r_pad: int = 16,
    alpha: float = 1.0,
    programs: int = 132,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[Rounded, Tensor | None]:
    """Return X ⊙ D in fp8, and L = X I [M, r_pad] where ``inner`` is given.

    Args:
        x: [M, K] of 16 bits with unit inner stride.
        factor: What D is made of: D_a of 1×1 blocks, or s − 1, K elements; None for D = 1.
        relu: Whether it passes through Eq. 7's relu.
        inner: A [R, K], R at most 32, where ``transposed``, else B [K, R].
        transposed: I = Aᵀ, else I = α B.
        r_pad: Padded rank of L.
        alpha: α.
        programs: Multiprocessors of the device.
        tile: Rows, warps, stages and shares of the columns; those of the shape if None.
    """
    m, k = x.shape
    groups = ceil_div(k, GROUP)
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
    stride = ceil_div(m, 4) * 4
    scales = torch.empty((groups, stride), dtype=torch.float32, device=x.device)
    # More rows share what they convert of the factor.
    rows, warps = (64, 8) if m >= 1024 else (16, 4)
    share = max(1, min(groups, 2 * programs // max(1, ceil_div(m, rows))))
    if inner is None:
        share = max(1, min(groups, ceil_div(8 * programs, max(1, ceil_div(m, rows)))))
    stages = 3
    if tile is not None:
        rows, warps, stages, share = tile
    low = None
    if inner is not None:
        low = torch.empty((m, r_pad), dtype=x.dtype, device=x.device)
        if share > 1:
            low = partial_sums(share, m, r_pad, device=x.device)
    if m == 0:
        return Rounded(codes, scales), x.new_empty(0, r_pad) if inner is not None else None
    programs_m = ceil_div(m, rows)
    launch(
        _quantize_kernel, (programs_m, share),
        x_ptr=x, factor_ptr=factor, inner_ptr=inner, codes_ptr=codes,
        scale_ptr=scales, low_ptr=low,
        M=m, K=k, R=0 if inner is None else inner.shape[0 if transposed else 1], alpha=alpha,
        stride_x=x.stride(0), stride_scale=stride,
        TRANSPOSED=transposed, DIAGONAL=Diagonal(1, relu), GROUP=GROUP,
        CONVERTS=x.is_cuda, TILE=QuantizeTile(rows, r_pad, stages), num_warps=warps, num_stages=2,
    )  # fmt: skip
    if low is not None and share > 1:
        low = launch_low_rank_sum(low, x.dtype, ProjectionOptions("triton", alpha)).low
    return Rounded(codes, scales), low
