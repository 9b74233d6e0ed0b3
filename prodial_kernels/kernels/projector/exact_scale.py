"""The scale's gradient where the division form is not sound, computed anew."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, ceil_div
from prodial_kernels.kernels.choices.tile_sizes import ExactScaleConfig
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.kernels.projector.tiles import (
    apply_diagonal,
    diagonal_of,
    load_factor,
    partial_sums,
    token_pointers,
    token_shape,
    window_columns,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream


class ExactScaleTile(NamedTuple):
    """Compile-time sizes of ``_exact_scale_kernel``.

    Attributes:
        block_m, block_n: Tokens and columns of dY in a step.
        window: Columns of X that a span lies in.
        splits: At least the splits of ds_part, a power of two.
    """

    block_m: int
    block_n: int
    window: int
    splits: int


@triton.jit
def _exact_scale_kernel(
    dy_ptr, x_ptr, w_ptr, blocks_ptr, partial_scale_ptr, exact_ptr,
    M, N, K, LENGTH, splits,
    stride_dy, stride_x, stride_w, batch_dy, batch_x,
    DY_CHANNEL_FIRST: tl.constexpr, X_CHANNEL_FIRST: tl.constexpr,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ds = rowsum((dYᵀ X) ⊙ (W D_b)) in parts, for columns whose ds_part holds a NaN.

    dY [M, N], X [M, K] (channel-first: [M / LENGTH, N, LENGTH], [M / LENGTH, K, LENGTH]),
    W [N, K], D_a [K / P, P, P], ds_part [splits, N] -> exact [shares, N].
    A program owns BLOCK_N columns of dY and one share of the spans, which are as many whole blocks
    as fit into ``window`` columns of X. It ends at once where nothing is asked for: nearly always.
    """
    P: tl.constexpr = DIAGONAL.p
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    WINDOW: tl.constexpr = TILE.window
    SPAN: tl.constexpr = (WINDOW // P) * P
    column = tl.program_id(0) * BLOCK_N
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if asks_anew(partial_scale_ptr, offs_n, mask_n, splits, N, TILE.splits):
        spans = tl.cdiv(K, SPAN)
        ds = tl.zeros((BLOCK_N,), dtype=tl.float32)
        # Not pipelined, whatever becomes of the loop inside: of one token nothing is left of it.
        for span in tl.range(tl.program_id(1), spans, tl.num_programs(1), num_stages=1):
            offs_k, mask_k = window_columns(span, K, P, WINDOW)
            acc = tl.zeros((BLOCK_N, WINDOW), dtype=tl.float32)
            for m in range(0, M, BLOCK_M):
                # By pointers: a span may start where the copy engine cannot.
                offs_m = m + tl.arange(0, BLOCK_M)
                mask_m = (offs_m < M)[:, None]
                source = token_pointers(
                    dy_ptr, offs_m, offs_n, LENGTH, stride_dy, batch_dy, DY_CHANNEL_FIRST
                )
                dy_tile = tl.load(source, mask=mask_m & mask_n[None, :], other=0.0)
                source = token_pointers(
                    x_ptr, offs_m, offs_k, LENGTH, stride_x, batch_x, X_CHANNEL_FIRST
                )
                x_tile = tl.load(source, mask=mask_m & mask_k[None, :], other=0.0)
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, WINDOW] -> [BLOCK_N, WINDOW]
                acc = tl.dot(dy_tile.T, x_tile, acc)
            w = tl.load(
                w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :],
                mask=mask_n[:, None] & mask_k[None, :], other=0.0,
            )  # fmt: skip
            wd = w.to(tl.float32)
            if blocks_ptr is not None:
                factor = load_factor(blocks_ptr, offs_k, K, w.dtype, DIAGONAL, False)
                wd = apply_diagonal(w, wd, factor, P)
            ds += tl.sum(acc * wd, 1)
        tl.store(exact_ptr + tl.program_id(1).to(tl.int64) * N + offs_n, ds, mask=mask_n)


@triton.jit
def asks_anew(partial_scale_ptr, offs_n, mask_n, splits, N, SPLITS: tl.constexpr):
    """Whether ds_part [splits, N] has a NaN in one of the columns; SPLITS: at least ``splits``."""
    split = tl.arange(0, SPLITS)
    part = tl.load(
        partial_scale_ptr + split.to(tl.int64)[:, None] * N + offs_n[None, :],
        mask=(split < splits)[:, None] & mask_n[None, :], other=0.0,
    )  # fmt: skip
    return tl.max(tl.max(tl.where(part != part, 1, 0), 0), 0) > 0


def launch_exact_scale(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    partial_scale: Tensor,
    options: ProjectionOptions,
    *,
    config: ExactScaleConfig,
    side: SideStream | None = None,
) -> Tensor:
    """Return exact [shares, N] in fp32, written only for columns with a NaN in ``partial_scale``.

    Args:
        dy: dY, [M, N] or channel-first [b, N, l].
        x: X, [M, K] or channel-first [b, K, l].
        operands: W and D_a.
        partial_scale: ds_part, [splits, N].
        options: How D_b is made of D_a.
        config: Tile sizes.
        side: Where to launch; the current stream if None.
    """
    weight, blocks = operands.weight, operands.blocks
    n, k = weight.shape
    diagonal = diagonal_of(blocks, options)
    shares = min(block_programs(k, config.window, diagonal.p), config.shares)
    exact = partial_sums(shares, n, device=dy.device)
    splits = partial_scale.shape[0]
    m, _ = token_shape(dy)
    launch(
        _exact_scale_kernel, (ceil_div(n, config.block_n), shares),
        dy_ptr=dy, x_ptr=x, w_ptr=weight, blocks_ptr=blocks, partial_scale_ptr=partial_scale,
        exact_ptr=exact,
        M=m, N=n, K=k, LENGTH=next((t.shape[2] for t in (dy, x) if t.ndim == 3), m),
        splits=splits,
        stride_dy=dy.stride(-2), stride_x=x.stride(-2), stride_w=weight.stride(0),
        batch_dy=dy.stride(0), batch_x=x.stride(0),
        DY_CHANNEL_FIRST=dy.ndim == 3, X_CHANNEL_FIRST=x.ndim == 3, DIAGONAL=diagonal,
        TILE=ExactScaleTile(
            config.block_m, config.block_n, config.window, triton.next_power_of_2(splits)
        ),
        num_warps=config.num_warps, num_stages=config.num_stages, side=side,
    )  # fmt: skip
    return exact
