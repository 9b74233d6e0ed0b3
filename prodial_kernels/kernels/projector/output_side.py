"""Gradients summed over tokens on the output side: B, s and the bias."""

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div, split_tokens
from prodial_kernels.kernels.choices.tile_sizes import ExactScaleConfig, OutputSideConfig
from prodial_kernels.kernels.projector.exact_scale import launch_exact_scale
from prodial_kernels.kernels.projector.operands import Kept, Needs, Operands, ProjectionOptions
from prodial_kernels.kernels.projector.tiles import (
    WalkTile,
    load_low_rank,
    load_tile,
    partial_sums,
    tiled,
    tma_ready,
    token_shape,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream


@triton.jit
def _output_side_kernel(
    dy, y, low_ptr, bias_ptr, b_ptr, deviation_ptr,
    partial_b_ptr, partial_scale_ptr, partial_bias_ptr,
    LENGTH, tiles_m, N, R, alpha,
    stride_dy, stride_y, batch_dy, batch_y, splits, tiles_per_split,
    CHANNEL_FIRST: tl.constexpr, TMA: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums over each split of the tokens, to be added up by reduce.py; None where not asked for.

    dB_part [splits, N, R_PAD] = dYᵀ L;  dbias_part [splits, N] = Σ dY;
    ds_part [splits, N] = Σ dY ⊙ Z / s with Z = Y − L B'ᵀ − bias = s ⊙ (U Wᵀ),
    from dY, Y [M, N] (CHANNEL_FIRST: [M / LENGTH, N, LENGTH]; else LENGTH = M), L [M, R_PAD],
    B [N, R], B' = α B, s − 1, bias [N]. ``tiles_m`` tiles of tokens, none of two sequences.
    Z itself is never made: Σ dY ⊙ L B'ᵀ is the sum over r of dB_part ⊙ B', and with Y in the place
    of dY likewise. Where Z is small along Y, as where s = 0, the rounding of Y has spoiled it;
    there ds_part is NaN, which asks exact_scale.py for the column.
    A program owns BLOCK_N columns of one split, one after another, split by split, so that it
    walks the tokens together with a product that runs beside it.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    R_PAD: tl.constexpr = TILE.rank
    NEED_SCALE: tl.constexpr = partial_scale_ptr is not None
    NEED_BIAS: tl.constexpr = partial_bias_ptr is not None
    HAS_LORA: tl.constexpr = low_ptr is not None
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    columns = tl.cdiv(N, BLOCK_N)
    tiles_sequence = tl.cdiv(LENGTH, BLOCK_M)
    offs_r = tl.arange(0, R_PAD)
    for item in range(tl.program_id(0), columns * splits, tl.num_programs(0)):
        split = item // columns
        column = (item % columns) * BLOCK_N
        offs_n = column + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        start = split * tiles_per_split
        stop = tl.minimum(start + tiles_per_split, tiles_m)

        dy_low = tl.zeros((BLOCK_N, R_PAD), dtype=tl.float32)
        y_low = tl.zeros((BLOCK_N, R_PAD), dtype=tl.float32)
        if NEED_SCALE:
            # Z here is still Y − bias.
            dy_z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            y_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if HAS_BIAS:
                y_z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if NEED_BIAS:
            dy_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

        # Only an explicit number of stages makes the compiler prefetch what no dot reads.
        for tile_m in tl.range(start, stop, num_stages=TILE.stages):
            sequence, m = 0, tile_m * BLOCK_M
            if CHANNEL_FIRST:
                sequence = tile_m // tiles_sequence
                m = tile_m % tiles_sequence * BLOCK_M
            dy_tile = _load_tokens(
                dy, sequence, m, column, LENGTH, N, stride_dy, batch_dy,
                BLOCK_M, BLOCK_N, CHANNEL_FIRST, TMA,
            )  # fmt: skip
            offs_m = m + tl.arange(0, BLOCK_M)
            if HAS_LORA:
                rows = (sequence * LENGTH + offs_m).to(tl.int64)[:, None]
                source = low_ptr + rows * R_PAD + offs_r[None, :]
                low = tl.load(source, mask=(offs_m < LENGTH)[:, None], other=0.0)
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, R_PAD] -> [BLOCK_N, R_PAD]
                dy_low = tl.dot(dy_tile.T, low, dy_low)
            wide_dy = dy_tile.to(tl.float32)
            if NEED_SCALE:
                y_tile = _load_tokens(
                    y, sequence, m, column, LENGTH, N, stride_y, batch_y,
                    BLOCK_M, BLOCK_N, CHANNEL_FIRST, TMA,
                )  # fmt: skip
                if HAS_LORA:
                    y_low = tl.dot(y_tile.T, low, y_low)
                wide_y = y_tile.to(tl.float32)
                z = wide_y
                if HAS_BIAS:
                    z -= bias[None, :]
                    y_z += wide_y * z
                # Rows past the last are 0 in both dY and Y.
                y_y += wide_y * wide_y
                dy_z += wide_dy * z
            if NEED_BIAS:
                dy_sum += wide_dy

        part = split.to(tl.int64) * N + offs_n
        if HAS_LORA and partial_b_ptr is not None:
            target = partial_b_ptr + part[:, None] * R_PAD + offs_r[None, :]
            tl.store(target, dy_low, mask=mask_n[:, None])
        if NEED_BIAS:
            tl.store(partial_bias_ptr + part, tl.sum(dy_sum, 0), mask=mask_n)
        if NEED_SCALE:
            ds = tl.sum(dy_z, 0)
            norm = tl.sum(y_y, 0)
            along = norm
            if HAS_BIAS:
                along = tl.sum(y_z, 0)
            store_scale_sums(
                partial_scale_ptr + part, ds, norm, along, dy_low, y_low, low_ptr, b_ptr,
                deviation_ptr, offs_n, mask_n, N, R, alpha,
            )  # fmt: skip


@triton.jit
def store_scale_sums(
    target, ds, norm, along, dy_low, y_low, low_ptr, b_ptr, deviation_ptr, offs_n, mask_n,
    N, R, alpha,
):  # fmt: skip
    """Store Σ dY ⊙ Z / s [BLOCK_N], or NaN where the rounding of Y has spoiled Z.

    From Σ dY ⊙ Z, Σ Y² and Σ Y ⊙ Z with Y − bias for Z, and dYᵀ L and Yᵀ L [BLOCK_N, R_PAD] where
    there is an L.
    """
    if low_ptr is not None:
        offs_r = tl.arange(0, dy_low.shape[1])
        # As forward rounded it.
        b = load_low_rank(b_ptr, offs_n, offs_r, N, R, alpha, low_ptr.dtype.element_ty, False)
        b = b.to(tl.float32)
        ds -= tl.sum(dy_low * b, 1)
        along -= tl.sum(y_low * b, 1)
    scale = 1 + tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    # ⟨Y, Z⟩ ≥ 0.4 |Y|², so |Z| ≥ 0.4 |Y|: ops/README.md. What 1 was added to is 0 or at
    # least 2^-24, and so never takes the quotient out of fp32's range.
    spoiled = (tl.abs(along) < 0.4 * norm) | (scale == 0)
    quotient = tl.where(spoiled, float("nan"), ds / tl.where(spoiled, 1.0, scale))
    tl.store(target, quotient, mask=mask_n)


@triton.jit
def _load_tokens(
    source, sequence, token, column, LENGTH, N, stride, stride_batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHANNEL_FIRST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of a matrix of tokens in either layout."""
    if CHANNEL_FIRST:
        tile = load_tile(
            source, sequence, column, token, N, LENGTH, stride, stride_batch,
            BLOCK_N, BLOCK_M, True, TMA,
        ).T  # fmt: skip
    else:
        tile = load_tile(
            source, sequence, token, column, LENGTH, N, stride, stride_batch,
            BLOCK_M, BLOCK_N, False, TMA,
        )  # fmt: skip
    return tile


def launch_output_side(
    dy: Tensor,
    y: Tensor | None,
    low: Tensor | None,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
    *,
    config: OutputSideConfig,
    side: SideStream | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the fp32 parts that ``needs`` asks for: dB [S, N, R_PAD], ds [S, N], dbias [S, N].

    Args:
        dy: dY, [M, N] or channel-first [b, N, l].
        y: Y, like ``dy``; for ds.
        low: L, [M, R_PAD], for dB and ds; None for no LoRA term.
        operands: B, s − 1 and the bias, for ds.
        options: α.
        needs: Which sums.
        config: Tile sizes.
        side: Where to launch; the current stream if None.
    """
    m, n = token_shape(dy)
    tma = config.tma and tma_ready(dy) and (y is None or tma_ready(y))
    if config.tma and not tma:
        # Addresses take the registers that a wide tile would.
        config = replace(config, block_n=min(config.block_n, 64))
    channel_first = dy.ndim == 3
    length = dy.shape[2] if channel_first else m
    tiles_m = m // length * ceil_div(length, config.block_m)
    r_pad = 16 if low is None else low.shape[1]
    columns = ceil_div(n, config.block_n)
    splits, rows = split_tokens(tiles_m * config.block_m, columns, config.block_m, config.items)
    device = dy.device
    partial_b = partial_sums(splits, n, r_pad, device=device) if needs.lora_b else None
    partial_scale = partial_sums(splits, n, device=device) if needs.scale else None
    partial_bias = partial_sums(splits, n, device=device) if needs.bias else None
    items = columns * splits
    tile = [config.block_m, config.block_n]
    if channel_first:
        tile.reverse()
    launch(
        _output_side_kernel, (min(items, config.programs or items),),
        dy=tiled(dy, tile, tma), y=tiled(y, tile, tma), low_ptr=low, bias_ptr=operands.bias,
        b_ptr=operands.lora_b, deviation_ptr=operands.scale_deviation,
        partial_b_ptr=partial_b, partial_scale_ptr=partial_scale, partial_bias_ptr=partial_bias,
        LENGTH=length, tiles_m=tiles_m, N=n,
        R=0 if operands.lora_b is None else operands.lora_b.shape[1], alpha=options.lora_scaling,
        stride_dy=dy.stride(-2), stride_y=0 if y is None else y.stride(-2),
        batch_dy=dy.stride(0), batch_y=0 if y is None else y.stride(0),
        splits=splits, tiles_per_split=rows // config.block_m,
        CHANNEL_FIRST=channel_first, TMA=tma,
        TILE=WalkTile(config.block_m, config.block_n, r_pad, config.num_stages),
        num_warps=config.num_warps, num_stages=2, side=side,
    )  # fmt: skip
    return partial_b, partial_scale, partial_bias


class OutputSums(NamedTuple):
    """What :func:`launch_reduce` adds up: fp32 parts of dB, ds (twice) and dbias, or None."""

    b: Tensor | None = None
    scale: Tensor | None = None
    exact: Tensor | None = None
    bias: Tensor | None = None


def launch_output_sums(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
    *,
    config: OutputSideConfig,
    exact: ExactScaleConfig,
    side: SideStream | None,
) -> OutputSums:
    """Launch the sums, and ds anew where the division form is not sound, on ``side``.

    Shapes as in :func:`prodial_kernels.kernels.projector.passes.backward`; ``needs`` asks only for
    parts that ``operands`` have. On a side stream, what it returns must outlive the join.
    """
    if not (needs.lora_b or needs.scale or needs.bias):
        return OutputSums()
    low = kept.h if needs.scale or needs.lora_b else None
    b, scale, bias = launch_output_side(
        dy, kept.y, low, operands, options, needs, config=config, side=side
    )
    anew = None
    if scale is not None:
        anew = launch_exact_scale(dy, x, operands, scale, options, config=exact, side=side)
    return OutputSums(b, scale, anew, bias)
