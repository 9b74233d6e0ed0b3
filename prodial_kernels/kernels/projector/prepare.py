"""What the large products need first: V = s ⊙ (W D_b), U = X D_bᵀ or dY ⊙ s, factors, L = X I."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, ceil_div, fold_tile
from prodial_kernels.kernels.choices.tile_sizes import choose_low_rank, padded_rank
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.kernels.projector.pdl import trigger_next
from prodial_kernels.kernels.projector.tiles import (
    Diagonal,
    apply_diagonal,
    diagonal_of,
    dropout_keep,
    load_deviation,
    load_factor,
    load_low_rank,
    token_pointers,
    token_shape,
    window_columns,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream


class PrepareTile(NamedTuple):
    """Compile-time sizes of ``_prepare_kernel``.

    Attributes:
        low_rows, low_depth: Rows of L that a program owns, and elements of their sums in a step.
        low_stages: Stages of its loop.
        fold_rows, window: Rows and columns of a tile of V.
        rank: R_PAD, the padded rank.
        adds: Whether α B A is added to V.
    """

    low_rows: int
    low_depth: int
    low_stages: int
    fold_rows: int
    window: int
    rank: int
    adds: bool


# More than 24 parameters, because these are two kernels in one launch. Apart, forward with a
# separate low-rank pass would take a launch more, and two launches of one stream are a microsecond
# apart (H100: of 42 µs at M, K, N = 2048, 1536, 768); PDL could not hide it, since the product
# needs the results of both, and only the launch directly before is known to have ended.
@triton.jit
def _prepare_kernel(
    x_ptr, inner_ptr, seed_ptr, low_ptr,
    w_ptr, blocks_ptr, deviation_ptr, b_ptr, v_ptr, b_out_ptr, a_out_ptr,
    M, ROWS, N, K, DEPTH, R, LENGTH, alpha,
    stride_x, batch_x, stride_w, stride_v, dropout, programs_low, columns,
    TRANSPOSED: tl.constexpr, CHANNEL_FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
    ON_ACTIVATIONS: tl.constexpr, B_TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
    TRIGGERS_NEXT: tl.constexpr,
):  # fmt: skip
    """Two jobs that need nothing of each other: L = dropout(X) I, and V = s ⊙ (W D_b), A', B'.

    X [M, DEPTH] ([M / LENGTH, DEPTH, LENGTH] where CHANNEL_FIRST), L [M, R_PAD]; W, V [ROWS, K];
    the other shapes as in the two functions below. What is None is not made, or has no part in it.
    ON_ACTIVATIONS: U = X D_bᵀ is made instead of V, with X in W's place.
    The first ``programs_low`` programs own low_rows rows of L each, the others one tile of V.
    TRIGGERS_NEXT: a PDL launch may follow.
    """
    if TRIGGERS_NEXT:
        trigger_next()
    pid = tl.program_id(0)
    if pid < programs_low:
        if low_ptr is not None:
            _low_rank(
                x_ptr, inner_ptr, seed_ptr, low_ptr, pid, M, DEPTH, R, LENGTH, alpha,
                stride_x, batch_x, dropout, TRANSPOSED, CHANNEL_FIRST, TILE,
            )  # fmt: skip
    else:
        tile = pid - programs_low
        _fold(
            w_ptr, blocks_ptr, deviation_ptr, inner_ptr, b_ptr, v_ptr, a_out_ptr, b_out_ptr,
            tile // columns, tile % columns, ROWS, N, K, R, alpha, stride_w, stride_v,
            DIAGONAL, ON_ACTIVATIONS, B_TRANSPOSED, TILE,
        )  # fmt: skip


@triton.jit
def _low_rank(
    x_ptr, inner_ptr, seed_ptr, low_ptr, pid, M, K, R, LENGTH, alpha,
    stride_x, batch_x, dropout,
    TRANSPOSED: tl.constexpr, CHANNEL_FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """L = dropout(X) I for low_rows rows, in one walk over K; without a seed no dropout.

    X [M, K] in either layout, L [M, R_PAD]; I = Aᵀ with A [R, K] where TRANSPOSED, else I = α B
    with B [K, R].
    """
    BLOCK_M: tl.constexpr = TILE.low_rows
    BLOCK_K: tl.constexpr = TILE.low_depth
    R_PAD: tl.constexpr = TILE.rank
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R_PAD)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = (offs_m < M)[:, None]
    acc = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
    # An explicit number of stages also prefetches the factor, which is cast on its way.
    for k in tl.range(0, K, BLOCK_K, num_stages=TILE.low_stages):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        source = token_pointers(x_ptr, offs_m, offs_k, LENGTH, stride_x, batch_x, CHANNEL_FIRST)
        x = tl.load(source, mask=mask_m & mask_k[None, :], other=0.0)
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, rows, offs_k[None, :], K, dropout)
            x = tl.where(keep, x.to(tl.float32) / (1 - dropout), 0.0).to(x.dtype)
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, R_PAD] -> [BLOCK_M, R_PAD]
        inner = load_low_rank(inner_ptr, offs_k, offs_r, K, R, alpha, x.dtype, TRANSPOSED)
        acc = tl.dot(x, inner, acc)
    tl.store(
        low_ptr + rows * R_PAD + offs_r[None, :], acc.to(low_ptr.dtype.element_ty), mask=mask_m
    )


@triton.jit
def _fold(
    w_ptr, blocks_ptr, deviation_ptr, a_ptr, b_ptr, v_ptr, a_out_ptr, b_out_ptr,
    pid_n, pid_k, ROWS, N, K, R, alpha, stride_w, stride_v,
    DIAGONAL: tl.constexpr, ON_ACTIVATIONS: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """V = s ⊙ (W D_b) for fold_rows rows by as many whole blocks as fit into ``window`` columns.

    W, V [ROWS, K], D_b from D_a [K / P, P, P], or its transpose where ON_ACTIVATIONS, s − 1 [ROWS].
    The first row of tiles also writes A' = A, the first column B' = α B, both padded with zeros:
    A [R, K] -> A' [R_PAD, K], and B [N, R] -> B' [N, R_PAD], or [R_PAD, N] where B_TRANSPOSED.
    """
    BLOCK_N: tl.constexpr = TILE.fold_rows
    R_PAD: tl.constexpr = TILE.rank
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_n.to(tl.int64)
    offs_k, mask_k = window_columns(pid_k, K, DIAGONAL.p, TILE.window)
    offs_r = tl.arange(0, R_PAD)

    if v_ptr is not None:
        mask_n = offs_n < ROWS
        mask = mask_n[:, None] & mask_k[None, :]
        w = tl.load(w_ptr + rows[:, None] * stride_w + offs_k[None, :], mask=mask, other=0.0)
        v = w.to(tl.float32)
        if blocks_ptr is not None:
            if DIAGONAL.p == 1:
                # 1 is added behind the broadcast: before it, sm_100 spills registers beside L.
                v *= 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, DIAGONAL)[None, :]
            else:
                factor = load_factor(blocks_ptr, offs_k, K, w.dtype, DIAGONAL, ON_ACTIVATIONS)
                v = apply_diagonal(w, v, factor, DIAGONAL.p)
        if deviation_ptr is not None:
            shift = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            v *= 1 + shift[:, None]
        if TILE.adds:
            mask_b = mask_n[:, None] & (offs_r < R)[None, :]
            b = tl.load(b_ptr + rows[:, None] * R + offs_r[None, :], mask=mask_b, other=0.0)
            mask_a = (offs_r < R)[:, None] & mask_k[None, :]
            a = tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_a, other=0.0)
            # [BLOCK_N, R_PAD] @ [R_PAD, WINDOW] -> [BLOCK_N, WINDOW]
            b = (b.to(tl.float32) * alpha).to(w.dtype)
            v += tl.dot(b, a.to(w.dtype))
        tl.store(v_ptr + rows[:, None] * stride_v + offs_k[None, :], v.to(w.dtype), mask=mask)

    # Nested: what is None is known to the compiler, pid_n and pid_k only to the program.
    if a_out_ptr is not None:  # noqa: SIM102
        if pid_n == 0:
            lanes = offs_r[:, None] * K + offs_k[None, :]
            a = tl.load(a_ptr + lanes, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)
            tl.store(a_out_ptr + lanes, a.to(a_out_ptr.dtype.element_ty), mask=mask_k[None, :])
    if b_out_ptr is not None:  # noqa: SIM102
        if pid_k == 0:
            mask_n = offs_n < N
            b = tl.load(
                b_ptr + rows[:, None] * R + offs_r[None, :],
                mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0,
            )  # fmt: skip
            b = (b.to(tl.float32) * alpha).to(b_out_ptr.dtype.element_ty)
            if B_TRANSPOSED:
                target = b_out_ptr + offs_r.to(tl.int64)[None, :] * N + offs_n[:, None]
            else:
                target = b_out_ptr + rows[:, None] * R_PAD + offs_r[None, :]
            tl.store(target, b, mask=mask_n[:, None])


# What the kernel is given for a job that is not asked for.
_NO_LOW_RANK = {
    **dict.fromkeys(("x_ptr", "inner_ptr", "seed_ptr", "low_ptr")),
    **dict.fromkeys(("M", "DEPTH", "R", "LENGTH", "stride_x", "batch_x"), 0),
    "TRANSPOSED": False, "CHANNEL_FIRST": False,
}  # fmt: skip
_NO_FOLD = {
    **dict.fromkeys(("w_ptr", "blocks_ptr", "deviation_ptr", "b_ptr", "v_ptr", "b_out_ptr")),
    **dict.fromkeys(("ROWS", "N", "K", "stride_w", "stride_v"), 0),
    "a_out_ptr": None, "columns": 1, "DIAGONAL": Diagonal(1, True), "ON_ACTIVATIONS": False,
    "B_TRANSPOSED": False,
}  # fmt: skip


class Prepared(NamedTuple):
    """What :func:`launch_prepare` made.

    Attributes:
        v: V [N, K], the weight itself where nothing is folded into it; or U [M, K], likewise.
        a: A', [R_PAD, K], or None.
        b: B' = α B, [N, R_PAD] or transposed, or None.
        low: L, [M, R_PAD], or None.
    """

    v: Tensor
    a: Tensor | None
    b: Tensor | None
    low: Tensor | None


def launch_prepare(
    operands: Operands,
    options: ProjectionOptions,
    *,
    r_pad: int,
    low_rank_of: Tensor | None = None,
    activations: Tensor | None = None,
    b_transposed: bool = False,
    triggers_next: bool = False,
) -> Prepared:
    """Make V = s ⊙ (W D_b) and, of the factors that are given, B' = α B and A', or L.

    Args:
        operands: W, what is folded into it (D_a, s − 1), and the factors that are wanted in the
            weight's dtype (A, B).
        options: α, dropout, and how D_b is made of D_a.
        r_pad: Padded rank of A', B' and L.
        low_rank_of: X, [M, K] or channel-first [b, K, l]: L = dropout(X) Aᵀ is made, and not A'.
        activations: X, [M, K]: U = X D_bᵀ is made and not V, and s is the caller's to apply.
        b_transposed: Whether B' is [R_PAD, N] instead of [N, R_PAD].
        triggers_next: Whether a PDL launch follows.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, _, seed = operands
    source = weight
    if activations is not None:
        source, scale_deviation = activations, None
    n, k = weight.shape
    v = a_out = b_out = low = None
    low_rank, r = _NO_LOW_RANK, 0
    if blocks is not None or scale_deviation is not None:
        v = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if lora_b is not None:
        r = lora_b.shape[1]
        shape = (r_pad, n) if b_transposed else (n, r_pad)
        b_out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if lora_a is not None:
        r = lora_a.shape[0]
        if low_rank_of is not None:
            low, low_rank = _low_rank_job(low_rank_of, lora_a, seed, r_pad)
        else:
            a_out = torch.empty((r_pad, k), dtype=weight.dtype, device=weight.device)
    diagonal = diagonal_of(blocks, options)
    tile = fold_tile(diagonal.p, beside_low=low is not None)
    columns = 1
    if v is not None or a_out is not None:
        columns = block_programs(k, tile[1], diagonal.p)
    read = weight if v is None else source
    rows = max(int(a_out is not None) if v is None else read.shape[0], 0 if b_out is None else n)
    _launch(
        {
            **low_rank, "R": r, "inner_ptr": lora_a, "w_ptr": read, "blocks_ptr": blocks,
            "deviation_ptr": scale_deviation, "b_ptr": lora_b, "v_ptr": v, "b_out_ptr": b_out,
            "a_out_ptr": a_out, "ROWS": read.shape[0], "N": n, "K": k,
            "stride_w": read.stride(0), "stride_v": k, "columns": columns, "DIAGONAL": diagonal,
            "ON_ACTIVATIONS": activations is not None, "B_TRANSPOSED": b_transposed,
        },
        columns * ceil_div(rows, tile[0]), tile, options, r_pad,
        TRIGGERS_NEXT=triggers_next, num_warps=4 if seed is not None or diagonal.p <= 64 else 8,
    )  # fmt: skip
    return Prepared(source if v is None else v, a_out, b_out, low)


def launch_low_rank(
    dy: Tensor,
    lora_b: Tensor,
    options: ProjectionOptions,
    r_pad: int,
    side: SideStream | None = None,
    *,
    transposed: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """Return T = α dY B, [M, R_PAD], for dY [M, N] or [b, N, l] and B [N, R], on ``side``.

    With ``transposed``, H = dropout(X) Aᵀ of X and A [R, K] in their places.
    """
    low, job = _low_rank_job(dy, lora_b, seed, r_pad, transposed=transposed)
    _launch(
        {**job, **_NO_FOLD}, 0, fold_tile(1), options, r_pad,
        TRIGGERS_NEXT=False, num_warps=4, side=side,
    )  # fmt: skip
    return low


def launch_sum(operands: Operands, options: ProjectionOptions, *, triggers_next: bool) -> Tensor:
    """Return s ⊙ (W D_b) + α B A, [N, K], of the parts that there are: W' itself, transient.

    For a weight that is nothing beside the activations. ``triggers_next``: a PDL launch follows.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, *_ = operands
    n, k = weight.shape
    if blocks is None and scale_deviation is None and lora_a is None:
        return weight
    r = 0 if lora_a is None else lora_a.shape[0]
    v = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    diagonal = diagonal_of(blocks, options)
    tile = fold_tile(diagonal.p)
    columns = block_programs(k, tile[1], diagonal.p)
    _launch(
        {
            **_NO_LOW_RANK, **_NO_FOLD, "inner_ptr": lora_a, "w_ptr": weight,
            "blocks_ptr": blocks, "deviation_ptr": scale_deviation, "b_ptr": lora_b, "v_ptr": v,
            "ROWS": n, "N": n, "K": k, "R": r, "stride_w": weight.stride(0), "stride_v": k,
            "columns": columns, "DIAGONAL": diagonal,
        },
        columns * ceil_div(n, tile[0]), tile, options, padded_rank(r), adds=lora_a is not None,
        TRIGGERS_NEXT=triggers_next, num_warps=4 if diagonal.p <= 64 else 8,
    )  # fmt: skip
    return v


def launch_scaled(
    dy: Tensor, scale_deviation: Tensor, scaled: Tensor, *, triggers_next: bool
) -> None:
    """Write dY ⊙ s [M, N], contiguous, of dY [M, N] and s − 1 [N]; a PDL launch may follow."""
    m, n = dy.shape
    tile = fold_tile(1)
    columns = block_programs(n, tile[1], 1)
    # dY in W's place, and s as free blocks of 1.
    _launch(
        {
            **_NO_LOW_RANK, **_NO_FOLD, "w_ptr": dy, "blocks_ptr": scale_deviation,
            "v_ptr": scaled, "ROWS": m, "K": n, "stride_w": dy.stride(0), "stride_v": n,
            "columns": columns, "DIAGONAL": Diagonal(1, False),
        },
        columns * ceil_div(m, tile[0]), tile, ProjectionOptions("triton"), 16,
        TRIGGERS_NEXT=triggers_next, num_warps=4,
    )  # fmt: skip


def _low_rank_job(
    x: Tensor, inner: Tensor, seed: Tensor | None, r_pad: int, *, transposed: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """L of ``inner``, A [R, K] where ``transposed`` or B [K, R], and what the kernel is given."""
    m, depth = token_shape(x)
    low = torch.empty((m, r_pad), dtype=x.dtype, device=x.device)
    return low, {
        "x_ptr": x, "inner_ptr": inner, "seed_ptr": seed, "low_ptr": low,
        "M": m, "DEPTH": depth, "R": inner.shape[0 if transposed else 1],
        "LENGTH": x.shape[2] if x.ndim == 3 else m, "stride_x": x.stride(-2),
        "batch_x": x.stride(0), "TRANSPOSED": transposed, "CHANNEL_FIRST": x.ndim == 3,
    }  # fmt: skip


def _launch(
    jobs: dict[str, Any],
    programs_fold: int,
    fold: tuple[int, int],
    options: ProjectionOptions,
    r_pad: int,
    *,
    adds: bool = False,
    **launched: Any,
) -> None:
    """Launch both jobs, the second by so many programs, each on a tile of the size ``fold``.

    ``adds``: see ``PrepareTile``.
    """
    m, dropout = jobs["M"], jobs["seed_ptr"] is not None
    even = jobs["stride_x"] % 16 == 0 and jobs["DEPTH"] % 16 == 0
    rows, depth = choose_low_rank(m, r_pad, dropout=dropout, even=even)
    programs_low = ceil_div(m, rows)
    if programs_low + programs_fold == 0:
        return
    launch(
        _prepare_kernel, (programs_low + programs_fold,), **jobs, alpha=options.lora_scaling,
        dropout=options.lora_dropout, programs_low=programs_low,
        TILE=PrepareTile(rows, depth, 3 if r_pad <= 64 else 2, *fold, r_pad, adds),
        num_stages=2, **launched,
    )  # fmt: skip
