"""The product of two matrices in fp8, by groups of 128 along K, with a projector's other terms."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.fp8.quantize import GROUP, Rounded
from prodial_kernels.kernels.projector.tiles import (
    load_tile,
    store_tile,
    swizzled_tile,
    tiled,
    tma_ready,
)
from prodial_kernels.kernels.replay.recorder import launch


class ProductTile(NamedTuple):
    """Compile-time sizes of ``_product_kernel``.

    Attributes:
        block_m, block_n: A tile of Y; block_n divides 128.
        rank: R_PAD, the padded rank.
        group_m: Row tiles that share L2.
        stages: Stages of the loop along K.
    """

    block_m: int
    block_n: int
    rank: int
    group_m: int
    stages: int


class ProductConfig(NamedTuple):
    """Tile sizes and launch options of :func:`launch_product`; ``programs``: 0 for one a tile."""

    block_m: int = 64
    block_n: int = 128
    group_m: int = 8
    stages: int = 3
    num_warps: int = 4
    programs: int = 0
    tma: bool = True


@triton.jit
def _product_kernel(
    left, right, left_scale_ptr, right_scale_ptr, deviation_ptr, low_ptr, outer_ptr, bias_ptr, y,
    M, N, K, R, alpha, stride_left_scale, stride_right_n, stride_right_k, stride_y,
    TMA: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Y = s ⊙ (X V) (+ L Oᵀ) (+ bias): X [M, K] is ``left``, Vᵀ [N, K] ``right``, both in e4m3.

    Scales: [⌈K / GROUP⌉, stride_left_scale] of X, of V one per GROUP rows and GROUP columns. Sums
    of a group are exact to the tensor core, those of the groups in fp32. The deviation is s − 1;
    O = α B with B [N, R]; what is None is left out.
    A program owns [BLOCK_M, BLOCK_N] tiles of Y, one after another.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    R_PAD: tl.constexpr = TILE.rank
    dtype: tl.constexpr = y.dtype if TMA else y.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    groups = tl.cdiv(K, GROUP)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = swizzled_tile(tile, tiles_m, tiles_n, TILE.group_m)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        mask_m = offs_m < M
        mask_n = offs_n < N
        right_scales = right_scale_ptr + (column // GROUP) * stride_right_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for group in tl.range(0, groups, num_stages=TILE.stages):
            k = group * GROUP
            x = load_tile(left, 0, row, k, M, K, K, 0, BLOCK_M, GROUP, False, TMA)
            v = load_tile(right, 0, column, k, N, K, K, 0, BLOCK_N, GROUP, False, TMA)
            x_scale = tl.load(
                left_scale_ptr + group * stride_left_scale + offs_m,
                mask=mask_m, other=0.0,
            )  # fmt: skip
            v_scale = tl.load(right_scales + group * stride_right_k)
            # [BLOCK_M, GROUP] @ [GROUP, BLOCK_N] -> [BLOCK_M, BLOCK_N]
            acc += tl.dot(x, v.T) * (x_scale * v_scale)[:, None]
        if deviation_ptr is not None:
            deviation = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            acc *= 1 + deviation[None, :]
        if outer_ptr is not None:
            for r in tl.static_range(0, R_PAD, 16):
                offs_r = r + tl.arange(0, 16)
                low = tl.load(
                    low_ptr + offs_m.to(tl.int64)[:, None] * R_PAD + offs_r[None, :],
                    mask=mask_m[:, None], other=0.0,
                )  # fmt: skip
                b = tl.load(
                    outer_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :],
                    mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0,
                )  # fmt: skip
                acc = tl.dot(low, (b.to(tl.float32) * alpha).to(low.dtype).T, acc)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        store_tile(
            y, 0, row, column, M, N, stride_y, 0, acc.to(dtype), BLOCK_M, BLOCK_N, False, TMA
        )


def choose_product(limits: DeviceLimits) -> ProductConfig:
    """Return the tile sizes on a device."""
    if limits.capability[0] != 9:
        # Of the least shared memory; speed is measured on Hopper alone.
        return ProductConfig(stages=2, tma=False)
    # Two programs share a multiprocessor, and one multiplies while the other scales: of eight
    # tiles the fastest on an H200 (874 TFLOP/s; 128×128 by eight warps 715).
    return ProductConfig()


def launch_product(
    x: Rounded,
    codes: Tensor,
    scale_inv: Tensor,
    y: Tensor,
    *,
    config: ProductConfig,
    scale_deviation: Tensor | None = None,
    low: Tensor | None = None,
    outer: Tensor | None = None,
    alpha: float = 1.0,
    bias: Tensor | None = None,
) -> None:
    """Write Y = s ⊙ (X V) + L (α B)ᵀ + bias to ``y``, [M, N] of 16 bits.

    Args:
        x: X [M, K].
        codes: Vᵀ [N, K] float8_e4m3fn, contiguous.
        scale_inv: Its scales, [⌈N / 128⌉, ⌈K / 128⌉] fp32.
        y: With unit inner stride.
        config: Tile sizes.
        scale_deviation: s − 1, [N].
        low: L, [M, R_PAD].
        outer: B, [N, R].
        alpha: α.
        bias: [N].
    """
    (m, k), n = x.codes.shape, codes.shape[0]
    if m == 0:
        return
    aligned = all(tma_ready(t) for t in (x.codes, codes, y))
    tma = config.tma and aligned
    # Addresses of rows that begin anywhere take the registers of a wide tile.
    bm, bn = config.block_m, config.block_n if aligned else min(config.block_n, 32)
    tiles = ceil_div(m, bm) * ceil_div(n, bn)
    stride_n, stride_k = scale_inv.stride()
    launch(
        _product_kernel, (min(tiles, config.programs) if config.programs else tiles,),
        left=tiled(x.codes, [bm, GROUP], tma), right=tiled(codes, [bn, GROUP], tma),
        left_scale_ptr=x.scales, right_scale_ptr=scale_inv, deviation_ptr=scale_deviation,
        low_ptr=low, outer_ptr=outer, bias_ptr=bias, y=tiled(y, [bm, bn], tma),
        M=m, N=n, K=k, R=0 if outer is None else outer.shape[1], alpha=alpha,
        stride_left_scale=x.scales.stride(0), stride_right_n=stride_n, stride_right_k=stride_k,
        stride_y=y.stride(0), TMA=tma, GROUP=GROUP,
        TILE=ProductTile(
            bm, bn, 16 if low is None else low.shape[1], config.group_m, config.stages
        ),
        num_warps=config.num_warps, num_stages=config.stages,
    )  # fmt: skip
