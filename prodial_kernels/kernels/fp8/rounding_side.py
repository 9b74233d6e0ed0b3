"""One read of dY and Y: dY ⊙ s rounded to fp8, T, and the sums over tokens for B and s."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.costs import COSTS
from prodial_kernels.kernels.choices.partition import ceil_div, split_tokens
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits, walked_tiles
from prodial_kernels.kernels.fp8.quantize import GROUP, Rounded, round_group
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.kernels.projector.output_side import store_scale_sums
from prodial_kernels.kernels.projector.tiles import (
    load_low_rank,
    load_tile,
    partial_sums,
    store_tile,
    tiled,
    tma_ready,
)
from prodial_kernels.kernels.replay.recorder import launch


class RoundingSideTile(NamedTuple):
    """Compile-time sizes of ``_rounding_side_kernel``.

    Attributes:
        rows, columns: A tile of dY.
        kept: Rows over which a thread's sums of squares and products are not added up until the
            end: those that its program holds at a time.
        rank: R_PAD.
        stages: Stages of its loop.
    """

    rows: int
    columns: int
    kept: int
    rank: int
    stages: int


class RoundingSideConfig(NamedTuple):
    """Tile sizes and launch options of :func:`launch_rounding_side`."""

    block_m: int = 16
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 2
    items: int = 264
    programs: int = 0
    tma: bool = False


@triton.jit
def _rounding_side_kernel(
    dy, y, low_ptr, b_ptr, deviation_ptr,
    codes, scale_ptr, t_part_ptr, partial_b_ptr, partial_scale_ptr,
    M, tiles_m, N, R, alpha, stride_dy, stride_y, stride_scale, splits, tiles_per_split,
    TMA: tl.constexpr, GROUP: tl.constexpr, CONVERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Codes [M, N] and scales [N / GROUP, stride_scale] of dY ⊙ s, and what the same read makes.

    T_part [⌈N / BLOCK_N⌉, M, R_PAD] = α dY B over BLOCK_N columns each, and over each split of the
    tokens dB_part [splits, N, R_PAD] = dYᵀ L and ds_part [splits, N] = Σ dY ⊙ Z / s, which
    output_side.py defines. dY, Y [M, N], L [M, R_PAD], B [N, R], s − 1 [N]. Without L neither T nor
    dB, without Y no ds, without s − 1 s = 1.
    A program owns BLOCK_N columns of one split, one after another.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    KEPT: tl.constexpr = TILE.kept
    R_PAD: tl.constexpr = TILE.rank
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    HAS_LORA: tl.constexpr = low_ptr is not None
    NEED_SCALE: tl.constexpr = partial_scale_ptr is not None
    columns = tl.cdiv(N, BLOCK_N)
    offs_r = tl.arange(0, R_PAD)
    # Rows of codes: the groups of a token, and then those of the next.
    lane = tl.arange(0, BLOCK_M * GROUPS)
    for item in range(tl.program_id(0), columns * splits, tl.num_programs(0)):
        split = item // columns
        block = item % columns
        column = block * BLOCK_N
        offs_n = column + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        start = split * tiles_per_split
        stop = tl.minimum(start + tiles_per_split, tiles_m)
        group = block * GROUPS + lane % GROUPS
        if deviation_ptr is not None:
            factor = 1 + tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if HAS_LORA:
            b = load_low_rank(b_ptr, offs_n, offs_r, N, R, alpha, low_ptr.dtype.element_ty, False)
        dy_low = tl.zeros((BLOCK_N, R_PAD), dtype=tl.float32)
        y_low = tl.zeros((BLOCK_N, R_PAD), dtype=tl.float32)
        if NEED_SCALE:
            dy_y = tl.zeros((KEPT, BLOCK_N), dtype=tl.float32)
            y_y = tl.zeros((KEPT, BLOCK_N), dtype=tl.float32)

        for tile_m in tl.range(start, stop, num_stages=TILE.stages):
            m = tile_m * BLOCK_M
            offs_m = m + tl.arange(0, BLOCK_M)
            mask_m = (offs_m < M)[:, None]
            rows = offs_m.to(tl.int64)[:, None]
            dy_tile = load_tile(dy, 0, m, column, M, N, stride_dy, 0, BLOCK_M, BLOCK_N, False, TMA)
            if HAS_LORA:
                low = tl.load(low_ptr + rows * R_PAD + offs_r[None, :], mask=mask_m, other=0.0)
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, R_PAD] -> [BLOCK_N, R_PAD]
                dy_low = tl.dot(dy_tile.T, low, dy_low)
            wide = dy_tile.to(tl.float32)
            if NEED_SCALE:
                y_tile = load_tile(y, 0, m, column, M, N, stride_y, 0, BLOCK_M, BLOCK_N, False, TMA)
                if HAS_LORA:
                    y_low = tl.dot(y_tile.T, low, y_low)
                wide_y = y_tile.to(tl.float32)
                # Of the rows of a thread, in its registers.
                dy_y += tl.sum(tl.reshape(wide * wide_y, (BLOCK_M // KEPT, KEPT, BLOCK_N)), 0)
                y_y += tl.sum(tl.reshape(wide_y * wide_y, (BLOCK_M // KEPT, KEPT, BLOCK_N)), 0)
            if HAS_LORA:
                # [BLOCK_M, BLOCK_N] @ [BLOCK_N, R_PAD] -> [BLOCK_M, R_PAD]
                t = tl.dot(dy_tile, b)
                at = t_part_ptr + block.to(tl.int64) * M * R_PAD + rows * R_PAD + offs_r[None, :]
                tl.store(at, t, mask=mask_m)
            if deviation_ptr is not None:
                # Rounded once: a product in 16 bits would take half as many steps again.
                wide *= factor[None, :]
            tile, scale = round_group(tl.reshape(wide, (BLOCK_M * GROUPS, GROUP)), CONVERTS)
            tile = tl.reshape(tile, (BLOCK_M, BLOCK_N))
            store_tile(codes, 0, m, column, M, N, N, 0, tile, BLOCK_M, BLOCK_N, False, TMA)
            token = m + lane // GROUPS
            inside = (token < M) & (group * GROUP < N)
            tl.store(scale_ptr + group * stride_scale + token, scale, mask=inside)

        part = split.to(tl.int64) * N + offs_n
        if HAS_LORA:
            target = partial_b_ptr + part[:, None] * R_PAD + offs_r[None, :]
            tl.store(target, dy_low, mask=mask_n[:, None])
        if NEED_SCALE:
            ds = tl.sum(dy_y, 0)
            norm = tl.sum(y_y, 0)
            store_scale_sums(
                partial_scale_ptr + part, ds, norm, norm, dy_low, y_low, low_ptr, b_ptr,
                deviation_ptr, offs_n, mask_n, N, R, alpha,
            )  # fmt: skip


class RoundingSide(NamedTuple):
    """dY ⊙ s in fp8, and fp32 parts: dB [S, N, R_PAD], ds [S, N], T [C, M, R_PAD]; or None."""

    rounded: Rounded
    b: Tensor | None
    scale: Tensor | None
    t_parts: Tensor | None


def choose_rounding_side(m: int, n: int, limits: DeviceLimits) -> RoundingSideConfig:
    """Return the tile sizes for dY [m, n] on a device."""
    if limits.capability[0] != 9:
        return RoundingSideConfig()
    block_m, block_n, programs = 32, GROUP, 2 * limits.processors
    columns, tiles = ceil_div(n, block_n), ceil_div(m, block_m)

    def duration(splits: int) -> float:
        # Few parts are cheaper to add up.
        return walked_tiles(columns, tiles, splits, programs) + COSTS.walk_split * splits

    splits = min(range(1, 33), key=duration)
    return RoundingSideConfig(
        block_m, block_n, num_stages=3, items=columns * splits, programs=programs, tma=True
    )


def launch_rounding_side(
    dy: Tensor,
    y: Tensor | None,
    low: Tensor | None,
    operands: Operands,
    options: ProjectionOptions,
    *,
    config: RoundingSideConfig,
) -> RoundingSide:
    """Return what one read of dY and Y makes.

    Args:
        dy: dY [M, N], N a multiple of 128.
        y: Y [M, N], for ds; None for none.
        low: L [M, R_PAD], for dB and T; None for no LoRA term.
        operands: B and s − 1.
        options: α.
        config: Tile sizes.
    """
    m, n = dy.shape
    tma = config.tma and tma_ready(dy) and (y is None or tma_ready(y))
    block_m, block_n = config.block_m, config.block_n
    tiles_m, columns = ceil_div(m, block_m), ceil_div(n, block_n)
    r_pad = 16 if low is None else low.shape[1]
    splits, rows = split_tokens(tiles_m * block_m, columns, block_m, config.items)
    device = dy.device
    stride = ceil_div(m, 4) * 4
    codes = torch.empty((m, n), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty((n // GROUP, stride), dtype=torch.float32, device=device)
    t_parts = None if low is None else partial_sums(columns, m, r_pad, device=device)
    partial_b = None if low is None else partial_sums(splits, n, r_pad, device=device)
    partial_scale = None if y is None else partial_sums(splits, n, device=device)
    items = columns * splits
    # Eight elements of a row are one thread's.
    kept = min(block_m, 256 * config.num_warps // block_n)
    launch(
        _rounding_side_kernel, (min(items, config.programs or items),),
        dy=tiled(dy, [block_m, block_n], tma), y=tiled(y, [block_m, block_n], tma), low_ptr=low,
        b_ptr=operands.lora_b, deviation_ptr=operands.scale_deviation,
        codes=tiled(codes, [block_m, block_n], tma), scale_ptr=scales, t_part_ptr=t_parts,
        partial_b_ptr=partial_b, partial_scale_ptr=partial_scale, M=m, tiles_m=tiles_m, N=n,
        R=0 if operands.lora_b is None else operands.lora_b.shape[1], alpha=options.lora_scaling,
        stride_dy=dy.stride(0), stride_y=0 if y is None else y.stride(0), stride_scale=stride,
        splits=splits, tiles_per_split=rows // block_m,
        TMA=tma, GROUP=GROUP, CONVERTS=dy.is_cuda,
        TILE=RoundingSideTile(block_m, block_n, kept, r_pad, config.num_stages),
        num_warps=config.num_warps, num_stages=2,
    )  # fmt: skip
    return RoundingSide(Rounded(codes, scales), partial_b, partial_scale, t_parts)
