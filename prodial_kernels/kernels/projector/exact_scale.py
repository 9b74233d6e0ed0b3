"""The scale's gradient where the division form is not sound, computed anew."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, ceil_div
from prodial_kernels.kernels.choices.tile_sizes import ExactScaleConfig
from prodial_kernels.kernels.projector.tiles import (
    block_size_of,
    load_deviation,
    token_pointers,
    token_shape,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream


@triton.jit
def _exact_scale_kernel(
    dy_ptr, x_ptr, w_ptr, blocks_ptr, partial_scale_ptr, exact_ptr,
    M, N, K, LENGTH, splits,
    stride_dy, stride_x, stride_w, batch_dy, batch_x,
    P: tl.constexpr, RELU: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    DY_CHANNEL_FIRST: tl.constexpr, X_CHANNEL_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """ds = Σ over the spans of rowsum((dYᵀ X) ⊙ (W D_b)), for columns whose ds_part holds a NaN.

    dY [M, N], X [M, K] (channel-first: [M / LENGTH, N, LENGTH], [M / LENGTH, K, LENGTH]),
    W [N, K], D_a [K / P, P, P], ds_part [splits, N] -> exact [spans, N].
    One program owns BLOCK_N columns of dY and some of the spans, which are as many whole blocks as
    fit into WINDOW columns of X. It leaves at once where nothing is asked for: nearly always.
    """
    SPAN: tl.constexpr = (WINDOW // P) * P
    column = tl.program_id(0) * BLOCK_N
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    split = tl.arange(0, SPLITS)
    part = tl.load(
        partial_scale_ptr + split.to(tl.int64)[:, None] * N + offs_n[None, :],
        mask=(split < splits)[:, None] & mask_n[None, :], other=0.0,
    )  # fmt: skip
    if tl.max(tl.max(tl.where(part != part, 1, 0), 0), 0) > 0:
        lane = tl.arange(0, WINDOW)
        spans = tl.cdiv(K, SPAN)
        # Not pipelined, whatever becomes of the loop inside: of one token nothing is left of it.
        for span in tl.range(tl.program_id(1), spans, tl.num_programs(1), num_stages=1):
            offs_k = span * SPAN + lane
            mask_k = (lane < SPAN) & (offs_k < K)
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
            if HAS_BLOCKS:
                if P == 1:
                    wd *= 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, P, RELU)[None, :]
                else:
                    e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, P, RELU)
                    # [BLOCK_N, WINDOW] @ [WINDOW, WINDOW] -> [BLOCK_N, WINDOW]
                    wd += tl.dot(w, e.to(w.dtype))
            ds = tl.sum(acc * wd, 1)
            tl.store(exact_ptr + span * N + offs_n, ds, mask=mask_n)


def launch_exact_scale(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    partial_scale: Tensor,
    *,
    relu: bool,
    config: ExactScaleConfig,
    side: SideStream | None = None,
) -> Tensor:
    """Return exact [spans, N] in fp32, written only for columns with a NaN in ``partial_scale``.

    Args:
        dy: dY, [M, N] or channel-first [b, N, l].
        x: X, [M, K] or channel-first [b, K, l].
        weight: W, [N, K].
        blocks: D_a, [K / P, P, P].
        partial_scale: ds_part, [splits, N].
        relu: Whether D_a's diagonal passes through Eq. 7's relu.
        config: Tile sizes.
        side: Where to launch; the current stream if None.
    """
    n, k = weight.shape
    p = block_size_of(blocks)
    spans = block_programs(k, config.window, p)
    exact = torch.empty((spans, n), dtype=torch.float32, device=dy.device)
    splits = partial_scale.shape[0]
    m, _ = token_shape(dy)
    length = next((t.shape[2] for t in (dy, x) if t.ndim == 3), m)
    launch(
        _exact_scale_kernel, (ceil_div(n, config.block_n), min(spans, config.shares)),
        dy, x, weight, blocks, partial_scale, exact,
        m, n, k, length, splits,
        dy.stride(-2), x.stride(-2), weight.stride(0), dy.stride(0), x.stride(0),
        P=p, RELU=relu, HAS_BLOCKS=blocks is not None,
        DY_CHANNEL_FIRST=dy.ndim == 3, X_CHANNEL_FIRST=x.ndim == 3,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, WINDOW=config.window,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=config.num_warps, num_stages=config.num_stages, side=side,
    )  # fmt: skip
    return exact
