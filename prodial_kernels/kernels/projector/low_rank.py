"""L = X I of few tokens, by parts of its sums, and X ⊙ d in the same read."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import LowRankConfig
from prodial_kernels.kernels.projector.operands import ProjectionOptions
from prodial_kernels.kernels.projector.pdl import trigger_next
from prodial_kernels.kernels.projector.reduce import BLOCK, PARTS, sum_parts
from prodial_kernels.kernels.projector.tiles import (
    Diagonal,
    load_deviation,
    load_low_rank,
    partial_sums,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream


class LowRankTile(NamedTuple):
    """Compile-time sizes of ``_low_rank_parts_kernel``.

    Attributes:
        rows: Tokens of a program.
        depth: Columns of X in a step of its sum.
        steps: How many steps it takes.
        stages: Stages of its loop.
        rank: R_PAD, the padded rank.
    """

    rows: int
    depth: int
    steps: int
    stages: int
    rank: int


@triton.jit
def _low_rank_parts_kernel(
    x_ptr, inner_ptr, deviation_ptr, scaled_ptr, parts_ptr,
    M, DEPTH, R, spans, part_stride, alpha, stride_x, stride_scaled,
    TRANSPOSED: tl.constexpr, DIAGONAL: tl.constexpr, TILE: tl.constexpr,
    TRIGGERS_NEXT: tl.constexpr,
):  # fmt: skip
    """L_part = X I over the columns of a span, and X ⊙ d, d = 1 + e, where ``scaled`` is given.

    X [M, DEPTH], L_part [spans, M, R_PAD] with ``part_stride`` elements from span to span, e as
    ``DIAGONAL`` reads it; I = Aᵀ with A [R, DEPTH] where TRANSPOSED, else I = α B with B [DEPTH,
    R].
    A program owns ``rows`` tokens by one span.
    TRIGGERS_NEXT: a PDL launch may follow.
    """
    if TRIGGERS_NEXT:
        trigger_next()
    ROWS: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.depth
    R_PAD: tl.constexpr = TILE.rank
    pid = tl.program_id(0)
    span = pid % spans
    offs_m = (pid // spans) * ROWS + tl.arange(0, ROWS)
    mask_m = (offs_m < M)[:, None]
    rows = offs_m.to(tl.int64)[:, None]
    offs_r = tl.arange(0, R_PAD)
    acc = tl.zeros((ROWS, R_PAD), dtype=tl.float32)
    for step in tl.range(0, TILE.steps, num_stages=TILE.stages):
        offs_k = (span * TILE.steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < DEPTH
        mask = mask_m & mask_k[None, :]
        x = tl.load(x_ptr + rows * stride_x + offs_k[None, :], mask=mask, other=0.0)
        # [ROWS, BLOCK_K] @ [BLOCK_K, R_PAD] -> [ROWS, R_PAD]
        inner = load_low_rank(inner_ptr, offs_k, offs_r, DEPTH, R, alpha, x.dtype, TRANSPOSED)
        acc = tl.dot(x, inner, acc)
        if scaled_ptr is not None:
            factor = 1 + load_deviation(deviation_ptr, offs_k, offs_k, DEPTH, DIAGONAL)
            scaled = x.to(tl.float32) * factor[None, :]
            target = scaled_ptr + rows * stride_scaled + offs_k[None, :]
            tl.store(target, scaled.to(x.dtype), mask=mask)
    target = parts_ptr + span.to(tl.int64) * part_stride + rows * R_PAD + offs_r[None, :]
    tl.store(target, acc, mask=mask_m)


@triton.jit
def _low_rank_sum_kernel(
    parts_ptr, low_ptr, b_ptr, b_out_ptr, M, N, R, spans, end_low, alpha,
    R_PAD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, TRIGGERS_NEXT: tl.constexpr,
):  # fmt: skip
    """L = Σ L_part over the spans, in a fixed order, and B' = α B where it is asked for.

    L [M, R_PAD], L_part [spans, M, R_PAD]; B [N, R] -> B' [N, R_PAD], padded with zeros.
    A program owns BLOCK elements: of L below ``end_low``, of B' from there on.
    TRIGGERS_NEXT: a PDL launch may follow.
    """
    if TRIGGERS_NEXT:
        trigger_next()
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if pid < end_low:
        offs = pid.to(tl.int64) * BLOCK + lane
        size = tl.cast(M, tl.int64) * R_PAD
        total = sum_parts(parts_ptr, offs, spans, size, BLOCK, PARTS)
        tl.store(low_ptr + offs, total.to(low_ptr.dtype.element_ty), mask=offs < size)
    else:
        if b_out_ptr is not None:
            offs_b = (pid - end_low).to(tl.int64) * BLOCK + lane
            n, r = offs_b // R_PAD, offs_b % R_PAD
            inside = n < N
            b = tl.load(b_ptr + n * R + r, mask=inside & (r < R), other=0.0)
            b = b.to(tl.float32) * alpha
            tl.store(b_out_ptr + offs_b, b.to(b_out_ptr.dtype.element_ty), mask=inside)


def low_rank_parts(x: Tensor, r_pad: int, config: LowRankConfig) -> Tensor:
    """Return a new L_part, fp32 [spans, M, R_PAD], for X [M, D]."""
    m, depth = x.shape
    return partial_sums(ceil_div(depth, config.depth * config.steps), m, r_pad, device=x.device)


def launch_low_rank_parts(
    x: Tensor,
    inner: Tensor,
    parts: Tensor,
    options: ProjectionOptions,
    *,
    config: LowRankConfig,
    transposed: bool,
    scaled: Tensor | None = None,
    deviation: Tensor | None = None,
    diagonal: Diagonal | None = None,
    triggers_next: bool = False,
    side: SideStream | None = None,
) -> None:
    """Write L_part of X, and X ⊙ (1 + e) where it is asked for.

    Args:
        x: X, 16-bit [M, D] with unit inner stride.
        inner: A [R, D] where ``transposed``, else B [D, R].
        parts: L_part, fp32 [spans, M, R_PAD] or rows of one.
        options: α.
        config: Tile sizes, those that the parts were made for.
        transposed: Whether I = Aᵀ, else I = α B.
        scaled: X ⊙ (1 + e), which is written, [M, D] of X's dtype and contiguous; or None.
        deviation: e, D elements, for that.
        diagonal: How e is read from it; as it is if None.
        triggers_next: Whether a PDL launch follows.
        side: Where to launch; the current stream if None.
    """
    m, depth = x.shape
    spans, r_pad = parts.shape[0], parts.shape[2]
    programs = ceil_div(m, config.rows) * spans
    if programs:
        launch(
            _low_rank_parts_kernel, (programs,),
            x_ptr=x, inner_ptr=inner, deviation_ptr=deviation, scaled_ptr=scaled, parts_ptr=parts,
            M=m, DEPTH=depth, R=inner.shape[0 if transposed else 1], spans=spans,
            part_stride=parts.stride(0), alpha=options.lora_scaling, stride_x=x.stride(0),
            stride_scaled=depth, TRANSPOSED=transposed, DIAGONAL=diagonal or Diagonal(1, False),
            TILE=LowRankTile(config.rows, config.depth, config.steps, config.num_stages, r_pad),
            TRIGGERS_NEXT=triggers_next, num_warps=config.num_warps, side=side,
        )  # fmt: skip


class LowRank(NamedTuple):
    """L [M, R_PAD], and B' = α B [N, R_PAD] where it was asked for."""

    low: Tensor
    b: Tensor | None


def launch_low_rank_sum(
    parts: Tensor,
    dtype: torch.dtype,
    options: ProjectionOptions,
    *,
    lora_b: Tensor | None = None,
    triggers_next: bool = False,
    side: SideStream | None = None,
) -> LowRank:
    """Return L, [M, R_PAD] in ``dtype``, from its parts [spans, M, R_PAD], and α B of B [N, R].

    ``triggers_next``: a PDL launch follows. ``side``: where to launch; the current stream if None.
    """
    spans, m, r_pad = parts.shape
    low = torch.empty((m, r_pad), dtype=dtype, device=parts.device)
    b_out, n, r = None, 0, 0
    if lora_b is not None:
        n, r = lora_b.shape
        b_out = torch.empty((n, r_pad), dtype=dtype, device=parts.device)
    end_low = ceil_div(m * r_pad, BLOCK)
    programs = end_low + ceil_div(n * r_pad, BLOCK)
    if programs:
        launch(
            _low_rank_sum_kernel, (programs,),
            parts_ptr=parts, low_ptr=low, b_ptr=lora_b, b_out_ptr=b_out, M=m, N=n, R=r,
            spans=spans, end_low=end_low, alpha=options.lora_scaling,
            R_PAD=r_pad, BLOCK=BLOCK, PARTS=PARTS, TRIGGERS_NEXT=triggers_next,
            num_warps=4, side=side,
        )  # fmt: skip
    return LowRank(low, b_out)
