"""From F = dYᵀ X of a small weight every gradient of the adapter: F in parts, or its sums.

By tiles that stay in registers where those hold the sums (blocks of 1, ranks up to 32); else F is
written in parts, and weight_side.py sums over it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.small_weight import SumsConfig
from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.kernels.projector.operands import Needs, Operands, ProjectionOptions
from prodial_kernels.kernels.projector.pdl import pdl_options, trigger_next, wait_for_previous
from prodial_kernels.kernels.projector.tiles import (
    diagonal_of,
    load_deviation,
    load_low_rank,
    load_tile,
    partial_sums,
    tiled,
    tma_ready,
)
from prodial_kernels.kernels.projector.weight_side import WeightSums
from prodial_kernels.kernels.replay.recorder import launch


class OuterTile(NamedTuple):
    """Compile-time sizes of ``_outer_product_kernel``: tokens of a step, N and K of a tile."""

    block_m: int
    block_n: int
    block_k: int


@triton.jit
def _outer_product_kernel(
    dy, x, f_ptr, M, N, K, stride_dy, stride_x, steps_per_split,
    TMA: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """F_part [splits, N, K] = dYᵀ X over each split of the tokens, from dY [M, N], X [M, K].

    A program owns a [BLOCK_N, BLOCK_K] tile of F and one split: ``steps_per_split`` steps.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    across = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // across * BLOCK_N
    column = tl.program_id(0) % across * BLOCK_K
    split = tl.program_id(1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    start = split * steps_per_split
    for step in range(start, tl.minimum(start + steps_per_split, tl.cdiv(M, BLOCK_M))):
        m = step * BLOCK_M
        dy_tile = load_tile(dy, 0, m, row, M, N, stride_dy, 0, BLOCK_M, BLOCK_N, False, TMA)
        x_tile = load_tile(x, 0, m, column, M, K, stride_x, 0, BLOCK_M, BLOCK_K, False, TMA)
        # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_K] -> [BLOCK_N, BLOCK_K]
        acc = tl.dot(dy_tile.T, x_tile, acc)
    offs_n = row + tl.arange(0, BLOCK_N)
    offs_k = column + tl.arange(0, BLOCK_K)
    target = f_ptr + (split.to(tl.int64) * N + offs_n)[:, None] * K + offs_k[None, :]
    tl.store(target, acc, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def choose_outer_product(n: int, k: int) -> OuterTile:
    """The tile that reads the least of dY and X for an F [n, k] of a few hundred rows, columns."""

    def read(tile: OuterTile) -> int:
        tiles = ceil_div(n, tile.block_n) * ceil_div(k, tile.block_k)
        return tiles * (tile.block_n + tile.block_k)

    return min((OuterTile(64, *s) for s in ((128, 128), (128, 256), (256, 128))), key=read)


def launch_outer_product(
    dy: Tensor, x: Tensor, *, programs: int, scratch: Tensor | None, hopper: bool
) -> Tensor:
    """Return the parts of F = dYᵀ X, fp32 [splits, N, K], for dY [M, N] and X [M, K].

    Args:
        dy: dY.
        x: X.
        programs: How many programs share the work, about.
        scratch: 16-bit, contiguous; overwritten by the parts, as many as it holds, if it holds one.
        hopper: Whether the device is one, whose tiles are larger.
    """
    (m, n), k = dy.shape, x.shape[1]
    tile = choose_outer_product(n, k) if hopper else OuterTile(32, 64, 64)
    tiles = ceil_div(n, tile.block_n) * ceil_div(k, tile.block_k)
    steps = ceil_div(m, tile.block_m)
    splits = max(1, min(programs // tiles, steps))
    held = 0 if scratch is None else scratch.numel() // (2 * n * k)
    if held:
        splits = min(splits, held)
    each = ceil_div(steps, splits)
    splits = ceil_div(steps, each)
    if held and scratch is not None:
        held_parts = scratch.view(-1).narrow(0, 0, 2 * splits * n * k)
        parts = held_parts.view(torch.float32).view(splits, n, k)
    else:
        parts = partial_sums(splits, n, k, device=dy.device)
    tma = hopper and tma_ready(dy) and tma_ready(x)
    if hopper and not tma:
        # Addresses take the registers that a wide tile would.
        tile = OuterTile(64, 128, 128) if tile.block_n * tile.block_k > 128 * 128 else tile
        tiles = ceil_div(n, tile.block_n) * ceil_div(k, tile.block_k)
    launch(
        _outer_product_kernel, (tiles, splits),
        dy=tiled(dy, [tile.block_m, tile.block_n], tma),
        x=tiled(x, [tile.block_m, tile.block_k], tma), f_ptr=parts,
        M=m, N=n, K=k, stride_dy=dy.stride(0), stride_x=x.stride(0), steps_per_split=each,
        TMA=tma, TILE=tile, num_warps=8 if hopper else 4, num_stages=3,
    )  # fmt: skip
    return parts


class SumsTile(NamedTuple):
    """Compile-time sizes of ``_tile_sums_kernel``.

    Attributes:
        block_m: Tokens of a step.
        block_n: Rows of a tile of F.
        columns: Columns of the tile.
        rank: R_PAD, the padded rank.
        stages: Loads in flight.
    """

    block_m: int
    block_n: int
    columns: int
    rank: int
    stages: int


@triton.jit
def _tile_sums_kernel(
    dy, x, w_ptr, blocks_ptr, deviation_ptr, a_ptr, b_ptr,
    partial_scale_ptr, partial_e_ptr, partial_a_ptr, partial_b_ptr,
    M, N, K, R, alpha, stride_dy, stride_x, stride_w, steps_per_split,
    DIAGONAL: tl.constexpr, TMA: tl.constexpr, TILE: tl.constexpr,
    TRIGGERS_NEXT: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds = rowsum(F ⊙ (W D_b)), dE = colsum((s ⊙ W) ⊙ F), dB = F Aᵀ, dA = α Bᵀ F.

    F = dYᵀ X over a split of the tokens, dY [M, N], X [M, K]; W [N, K], D_b diagonal from D_a [K],
    s − 1 [N], A [R, K], B [N, R]. A program owns a tile of F, [BLOCK_N, COLUMNS], and one split:
    ``steps_per_split`` steps. ds_part [splits · windows, N], dB_part [splits · windows, N, R_PAD],
    dE_part [splits · tiles of rows, K], dA_part [splits · tiles of rows, R_PAD, K]; None: not asked
    for. TRIGGERS_NEXT: a PDL launch may follow. BESIDE: launched while the launch before drains, of
    which it needs nothing; it ends after that, so that what follows finds both done.
    """
    if TRIGGERS_NEXT:
        trigger_next()
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    COLUMNS: tl.constexpr = TILE.columns
    R_PAD: tl.constexpr = TILE.rank
    windows = tl.cdiv(K, COLUMNS)
    window = tl.program_id(0) % windows
    tile_n = tl.program_id(0) // windows
    split = tl.program_id(1)
    row = tile_n * BLOCK_N
    column = window * COLUMNS
    f = tl.zeros((BLOCK_N, COLUMNS), dtype=tl.float32)
    start = split * steps_per_split
    end = tl.minimum(start + steps_per_split, tl.cdiv(M, BLOCK_M))
    for step in tl.range(start, end, num_stages=TILE.stages):
        m = step * BLOCK_M
        g = load_tile(dy, 0, m, row, M, N, stride_dy, 0, BLOCK_M, BLOCK_N, False, TMA).T
        tile = load_tile(x, 0, m, column, M, K, stride_x, 0, BLOCK_M, COLUMNS, False, TMA)
        # [BLOCK_N, BLOCK_M] @ [BLOCK_M, COLUMNS] -> [BLOCK_N, COLUMNS]
        f = tl.dot(g, tile, f)

    offs_n = row + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R_PAD)
    mask_n = offs_n < N
    # The parts of the sums over columns, and of those over rows.
    rows = (split * windows + window).to(tl.int64) * N + offs_n
    part = (split * tl.cdiv(N, BLOCK_N) + tile_n).to(tl.int64)
    # Halves of a wide tile in loops: unrolled, or with all sums in one, they ask for more registers
    # than there are.
    SLICE: tl.constexpr = min(COLUMNS, 64)
    first, second = f, f
    if COLUMNS > SLICE:
        first, second = tl.split(tl.permute(tl.reshape(f, (BLOCK_N, 2, SLICE)), (0, 2, 1)))
    if partial_a_ptr is not None or partial_b_ptr is not None:
        b_sums = tl.zeros((R_PAD, BLOCK_N), dtype=tl.float32)
        for at in tl.range(0, COLUMNS, SLICE, num_stages=1):
            f_slice = tl.where(at == 0, first, second)
            b_sums = _sum_low_rank(
                f_slice, b_sums, a_ptr, b_ptr, partial_a_ptr, partial_b_ptr,
                offs_n, column + at, part, N, K, R, alpha, w_ptr.dtype.element_ty, SLICE, R_PAD,
            )  # fmt: skip
        if partial_b_ptr is not None:
            target = partial_b_ptr + rows[None, :] * R_PAD + offs_r[:, None]
            tl.store(target, b_sums, mask=mask_n[None, :])
    if partial_scale_ptr is not None or partial_e_ptr is not None:
        scale_sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for at in tl.range(0, COLUMNS, SLICE, num_stages=1):
            f_slice = tl.where(at == 0, first, second)
            offs_k = column + at + tl.arange(0, SLICE)
            mask_k = offs_k < K
            source = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]
            w = tl.load(source, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            f_slice *= w.to(tl.float32)
            if partial_scale_ptr is not None:
                along = f_slice
                if blocks_ptr is not None:
                    # 1 is added behind the broadcast, as where V is made.
                    shift = load_deviation(blocks_ptr, offs_k, offs_k, K, DIAGONAL)
                    along = f_slice * (1 + shift[None, :])
                scale_sums += tl.sum(along, 1)
            if partial_e_ptr is not None:
                if deviation_ptr is not None:
                    shift = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0)
                    f_slice *= 1 + shift.to(tl.float32)[:, None]
                tl.store(partial_e_ptr + part * K + offs_k, tl.sum(f_slice, 0), mask=mask_k)
        if partial_scale_ptr is not None:
            tl.store(partial_scale_ptr + rows, scale_sums, mask=mask_n)
    if BESIDE:
        wait_for_previous()


@triton.jit
def _sum_low_rank(
    f, b_sums, a_ptr, b_ptr, partial_a_ptr, partial_b_ptr,
    offs_n, column, part, N, K, R, alpha,
    dtype: tl.constexpr, SIZE: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Store α Bᵀ F for SIZE columns of F from ``column`` on; return dBᵀ [R_PAD, BLOCK_N] so far.

    The products have R_PAD rows, too few for wgmma, which would take F from registers.
    """
    offs_k = column + tl.arange(0, SIZE)
    offs_r = tl.arange(0, R_PAD)
    largest = 1.0
    if dtype == tl.float16:
        # It may not hold F, but its share of the tile's largest element.
        largest = tl.maximum(tl.max(tl.abs(f)), 1e-30)
        f /= largest
    rounded = f.to(dtype)
    if partial_b_ptr is not None:
        a = load_low_rank(a_ptr, offs_k, offs_r, K, R, alpha, dtype, True)
        # [R_PAD, SIZE] @ [SIZE, BLOCK_N] -> [R_PAD, BLOCK_N]
        b_sums += largest * tl.dot(a.T, rounded.T)
    if partial_a_ptr is not None:
        b = load_low_rank(b_ptr, offs_n, offs_r, N, R, alpha, dtype, False)
        # [R_PAD, BLOCK_N] @ [BLOCK_N, SIZE] -> [R_PAD, SIZE]
        da = largest * tl.dot(b.T, rounded)
        target = partial_a_ptr + (part * R_PAD + offs_r)[:, None] * K + offs_k[None, :]
        tl.store(target, da, mask=(offs_k < K)[None, :])
    return b_sums


def launch_tile_sums(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
    *,
    config: SumsConfig,
    scratch: Tensor | None,
    triggers_next: bool,
    beside: bool,
) -> WeightSums:
    """Return the parts that ``needs`` asks for, from dY [M, N] and X [M, K], M > 0.

    Those of s and B come in one number, those of D_a (of blocks of 1) and A in another.

    Args:
        dy: dY.
        x: X.
        operands: Of blocks of 1, and a rank that ``config`` was chosen for.
        options: α, and how D_b is made of D_a.
        needs: Which of s, D_a, A and B.
        config: Tile sizes.
        scratch: 16-bit, contiguous; overwritten by the parts if it holds those of half as many
            splits as there could be, or more.
        triggers_next: Whether a PDL launch follows.
        beside: Whether to start while the launch before drains, which triggers it and makes nothing
            that is read here.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, *_ = operands
    (m, n), k = dy.shape, x.shape[1]
    r = 0 if lora_a is None else lora_a.shape[0]
    r_pad = padded_rank(r)
    bm, bn = config.depth, config.rows
    windows, tiles = ceil_div(k, config.columns), ceil_div(n, bn)
    steps = ceil_div(m, bm)
    splits = max(1, min(config.programs // (windows * tiles), steps))
    # Of one split: s and B, D_a and A.
    parts: list[tuple[int, ...] | None] = [
        (windows, n) if needs.scale else None,
        (tiles, k) if needs.blocks else None,
        (tiles, r_pad, k) if needs.lora_a else None,
        (windows, n, r_pad) if needs.lora_b else None,
    ]
    floats = sum(math.prod(shape) for shape in parts if shape is not None)
    held = 0 if scratch is None else scratch.numel() // (2 * floats)
    if 2 * held >= splits:
        splits = min(splits, held)
    each = ceil_div(steps, splits)
    splits = ceil_div(steps, each)
    shapes = [None if part is None else (splits * part[0], *part[1:]) for part in parts]
    scale, blocks_sum, a, b = _parts(shapes, dy.device, scratch)
    launch(
        _tile_sums_kernel, (windows * tiles, splits),
        dy=tiled(dy, [bm, bn], config.tma), x=tiled(x, [bm, config.columns], config.tma),
        w_ptr=weight, blocks_ptr=blocks, deviation_ptr=scale_deviation, a_ptr=lora_a, b_ptr=lora_b,
        partial_scale_ptr=scale, partial_e_ptr=blocks_sum, partial_a_ptr=a, partial_b_ptr=b,
        M=m, N=n, K=k, R=r, alpha=options.lora_scaling,
        stride_dy=dy.stride(0), stride_x=x.stride(0), stride_w=weight.stride(0),
        steps_per_split=each, DIAGONAL=diagonal_of(blocks, options), TMA=config.tma,
        TILE=SumsTile(bm, bn, config.columns, r_pad, config.num_stages),
        TRIGGERS_NEXT=triggers_next, BESIDE=beside,
        num_warps=config.num_warps, num_stages=config.num_stages, **pdl_options(beside),
    )  # fmt: skip
    return WeightSums(scale, blocks_sum, a, b)


def _parts(
    shapes: list[tuple[int, ...] | None], device: torch.device, scratch: Tensor | None
) -> list[Tensor | None]:
    """New fp32 tensors of these shapes, or parts of ``scratch`` where it holds all of them."""
    sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
    held = scratch is not None and scratch.numel() // 2 >= sum(sizes)
    if scratch is None or not held:
        return [None if s is None else partial_sums(*s, device=device) for s in shapes]
    memory = scratch.view(-1).narrow(0, 0, 2 * sum(sizes)).view(torch.float32)
    rows = memory.split(sizes)
    return [None if s is None else part.view(s) for s, part in zip(shapes, rows, strict=True)]
