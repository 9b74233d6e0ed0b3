"""What the large products need first: V = s ⊙ (W D_b) or U = X D_bᵀ, the factors, and L = X I."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, ceil_div, fold_tile
from prodial_kernels.kernels.choices.tile_sizes import choose_low_rank
from prodial_kernels.kernels.projector.early_launch import open_way
from prodial_kernels.kernels.projector.tiles import (
    block_size_of,
    dropout_keep,
    load_deviation,
    token_pointers,
    token_shape,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream


@triton.jit
def _prepare_kernel(
    x_ptr, inner_ptr, seed_ptr, low_ptr,
    w_ptr, blocks_ptr, deviation_ptr, b_ptr, v_ptr, b_out_ptr, a_out_ptr,
    M, ROWS, N, K, DEPTH, R, LENGTH, alpha,
    stride_x, batch_x, stride_w, stride_v, dropout, programs_low, columns,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    P: tl.constexpr, RELU: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_FOLD: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    HAS_SCALE: tl.constexpr, TURN: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    R_PAD: tl.constexpr, STAGES: tl.constexpr, OPEN: tl.constexpr,
):  # fmt: skip
    """Two jobs that need nothing of each other: L = dropout(X) I, and V = s ⊙ (W + W E), A', B'.

    X [M, DEPTH] ([M / LENGTH, DEPTH, LENGTH] where CHANNEL_FIRST), L [M, R_PAD]; W, V [ROWS, K];
    the other shapes as in the two functions below. Where TURN, X stands for W and Eᵀ for E.
    The first ``programs_low`` programs own BLOCK_M rows of L each, the others one tile of V.
    OPEN: the next launch may begin early.
    """
    if OPEN:
        open_way()
    pid = tl.program_id(0)
    if pid < programs_low:
        if HAS_LOW:
            _low_rank(
                x_ptr, inner_ptr, seed_ptr, low_ptr, pid, M, DEPTH, R, LENGTH, alpha,
                stride_x, batch_x, dropout,
                TRANSPOSED, DROPOUT, CHANNEL_FIRST, BLOCK_M, BLOCK_K, R_PAD, STAGES,
            )  # fmt: skip
    else:
        tile = pid - programs_low
        _fold(
            w_ptr, blocks_ptr, deviation_ptr, inner_ptr, b_ptr, v_ptr, a_out_ptr, b_out_ptr,
            tile // columns, tile % columns, ROWS, N, K, R, alpha, stride_w, stride_v,
            P, RELU, HAS_FOLD, HAS_BLOCKS, HAS_SCALE, TURN, HAS_A, HAS_B, B_TRANSPOSED,
            BLOCK_N, WINDOW, R_PAD,
        )  # fmt: skip


@triton.jit
def _low_rank(
    x_ptr, inner_ptr, seed_ptr, low_ptr, pid, M, K, R, LENGTH, alpha,
    stride_x, batch_x, dropout,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, R_PAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L = dropout(X) I for BLOCK_M rows, in one walk over K.

    X [M, K] in either layout, L [M, R_PAD]; I = Aᵀ with A [R, K] where TRANSPOSED, else I = α B
    with B [K, R].
    """
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R_PAD)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = (offs_m < M)[:, None]
    acc = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
    # An explicit number of stages also runs ahead with the factor, which is cast on its way.
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        source = token_pointers(x_ptr, offs_m, offs_k, LENGTH, stride_x, batch_x, CHANNEL_FIRST)
        x = tl.load(source, mask=mask_m & mask_k[None, :], other=0.0)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, rows, offs_k[None, :], K, dropout)
            x = tl.where(keep, x.to(tl.float32) / (1 - dropout), 0.0).to(x.dtype)
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, R_PAD] -> [BLOCK_M, R_PAD]
        if TRANSPOSED:
            inner = tl.load(
                inner_ptr + offs_r[:, None] * K + offs_k[None, :],
                mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(x, inner.to(x.dtype).T, acc)
        else:
            inner = tl.load(
                inner_ptr + offs_k[:, None] * R + offs_r[None, :],
                mask=mask_k[:, None] & (offs_r < R)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(x, (inner.to(tl.float32) * alpha).to(x.dtype), acc)
    tl.store(
        low_ptr + rows * R_PAD + offs_r[None, :], acc.to(low_ptr.dtype.element_ty), mask=mask_m
    )


@triton.jit
def _fold(
    w_ptr, blocks_ptr, deviation_ptr, a_ptr, b_ptr, v_ptr, a_out_ptr, b_out_ptr,
    pid_n, pid_k, ROWS, N, K, R, alpha, stride_w, stride_v,
    P: tl.constexpr, RELU: tl.constexpr,
    HAS_FOLD: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_SCALE: tl.constexpr,
    TURN: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """V = s ⊙ (W + W E) for BLOCK_N rows by as many whole blocks as fit into WINDOW columns.

    W, V [ROWS, K], E = D_b − I from D_a [K / P, P, P], or its transpose where TURN, s − 1 [ROWS].
    The first row of tiles also writes A' = A, the first column B' = α B, both padded with zeros:
    A [R, K] -> A' [R_PAD, K], and B [N, R] -> B' [N, R_PAD], or [R_PAD, N] where B_TRANSPOSED.
    """
    SPAN: tl.constexpr = (WINDOW // P) * P
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_n.to(tl.int64)
    lane = tl.arange(0, WINDOW)
    offs_k = pid_k * SPAN + lane
    mask_k = (lane < SPAN) & (offs_k < K)
    offs_r = tl.arange(0, R_PAD)

    if HAS_FOLD:
        mask_n = offs_n < ROWS
        mask = mask_n[:, None] & mask_k[None, :]
        w = tl.load(w_ptr + rows[:, None] * stride_w + offs_k[None, :], mask=mask, other=0.0)
        v = w.to(tl.float32)
        if HAS_BLOCKS:
            if P == 1:
                v *= 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, P, RELU)[None, :]
            else:
                if TURN:
                    e = load_deviation(blocks_ptr, offs_k[None, :], offs_k[:, None], K, P, RELU)
                else:
                    e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, P, RELU)
                # [BLOCK_N, WINDOW] @ [WINDOW, WINDOW] -> [BLOCK_N, WINDOW]
                v += tl.dot(w, e.to(w.dtype))
        if HAS_SCALE:
            shift = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            v *= 1 + shift[:, None]
        tl.store(v_ptr + rows[:, None] * stride_v + offs_k[None, :], v.to(w.dtype), mask=mask)

    # Nested: HAS_A and HAS_B are known to the compiler, pid_n and pid_k only to the program.
    if HAS_A:  # noqa: SIM102
        if pid_n == 0:
            lanes = offs_r[:, None] * K + offs_k[None, :]
            a = tl.load(a_ptr + lanes, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)
            tl.store(a_out_ptr + lanes, a.to(a_out_ptr.dtype.element_ty), mask=mask_k[None, :])
    if HAS_B:  # noqa: SIM102
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


def launch_prepare(
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_b: Tensor | None,
    *,
    alpha: float,
    relu: bool,
    r_pad: int,
    x: Tensor | None = None,
    lora_a: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    turned: Tensor | None = None,
    b_transposed: bool = False,
    opens: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return V [N, K] (``weight`` itself where nothing is folded), B', and A' or, given ``x``, L.

    Given ``turned``, in place of V it is U = X D_bᵀ [M, K], and s is the caller's.

    Args:
        weight: W, [N, K].
        blocks: D_a, [K / P, P, P].
        scale_deviation: s − 1, [N].
        lora_b: B, [N, R].
        alpha: α.
        relu: Whether D_a's diagonal passes through Eq. 7's relu.
        r_pad: Padded rank of A', B' and L.
        x: X, [M, K] or channel-first [b, K, l], for L = dropout(X) Aᵀ, [M, R_PAD].
        lora_a: A, [R, K]; needed with ``x``, and alone for A', [R_PAD, K] in the weight's dtype.
        seed: [1] int64, switches dropout on.
        dropout: Probability.
        turned: X, [M, K], to be turned by the blocks where it is smaller than the weight.
        b_transposed: Whether B' = α B is [R_PAD, N] instead of [N, R_PAD].
        opens: Whether the next launch may begin early.
    """
    n, k = weight.shape
    source, row_deviation = (weight, scale_deviation) if turned is None else (turned, None)
    fold = blocks is not None or row_deviation is not None
    v = source
    if fold:
        v = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    a_out = b_out = low = None
    r = 0
    if lora_b is not None:
        r = lora_b.shape[1]
        shape = (r_pad, n) if b_transposed else (n, r_pad)
        b_out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if x is not None:
        low = torch.empty((token_shape(x)[0], r_pad), dtype=x.dtype, device=x.device)
    elif lora_a is not None:
        r = lora_a.shape[0]
        a_out = torch.empty((r_pad, k), dtype=weight.dtype, device=weight.device)
    p = block_size_of(blocks)
    tile = fold_tile(p, beside_low=low is not None)
    columns = block_programs(k, tile[1], p) if fold or a_out is not None else 1
    rows = max(source.shape[0] if fold else int(a_out is not None), n if b_out is not None else 0)
    _launch(
        x, lora_a, seed, low, source if fold else weight, blocks, row_deviation, lora_b, v, b_out,
        a_out, k, r, alpha, dropout,
        columns, ceil_div(rows, tile[0]), n=n,
        transposed=True, p=p, relu=relu, fold=fold, turn=turned is not None, tile=tile,
        r_pad=r_pad, b_transposed=b_transposed, opens=opens,
    )  # fmt: skip
    return v, b_out, a_out if low is None else low


def launch_low_rank(
    dy: Tensor, lora_b: Tensor, alpha: float, r_pad: int, side: SideStream | None
) -> Tensor:
    """Return T = α dY B, [M, R_PAD], for dY [M, N] or [b, N, l] and B [N, R], on ``side``."""
    low = torch.empty((token_shape(dy)[0], r_pad), dtype=dy.dtype, device=dy.device)
    _launch(
        dy, lora_b, None, low, lora_b, None, None, None, None, None, None, lora_b.shape[0],
        lora_b.shape[1], alpha, 0.0, 1, 0, n=0,
        transposed=False, p=1, relu=True, fold=False, turn=False, tile=(32, 64), r_pad=r_pad,
        side=side,
    )  # fmt: skip
    return low


def _launch(
    x: Tensor | None,
    inner: Tensor | None,
    seed: Tensor | None,
    low: Tensor | None,
    source: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_b: Tensor | None,
    v: Tensor | None,
    b_out: Tensor | None,
    a_out: Tensor | None,
    depth: int,
    r: int,
    alpha: float,
    dropout: float,
    columns: int,
    rows: int,
    *,
    n: int,
    transposed: bool,
    p: int,
    relu: bool,
    fold: bool,
    turn: bool,
    tile: tuple[int, int],
    r_pad: int,
    b_transposed: bool = False,
    opens: bool = False,
    side: SideStream | None = None,
) -> None:
    height, k = source.shape
    m = 0 if x is None else token_shape(x)[0]
    channel_first = x is not None and x.ndim == 3
    even = x is not None and x.stride(-2) % 16 == 0 and depth % 16 == 0
    block_m, block_k = choose_low_rank(m, r_pad, dropout=seed is not None, even=even)
    programs_low = ceil_div(m, block_m)
    if programs_low + rows * columns == 0:
        return
    launch(
        _prepare_kernel, (programs_low + rows * columns,),
        x, inner, seed, low,
        source, blocks, scale_deviation, lora_b, v, b_out, a_out,
        m, height, n, k, depth, r, x.shape[2] if x is not None and channel_first else m, alpha,
        0 if x is None else x.stride(-2), 0 if x is None else x.stride(0),
        source.stride(0), k, dropout, programs_low, columns,
        TRANSPOSED=transposed, DROPOUT=seed is not None, CHANNEL_FIRST=channel_first,
        P=p, RELU=relu,
        HAS_LOW=x is not None, HAS_FOLD=fold, HAS_BLOCKS=blocks is not None,
        HAS_SCALE=scale_deviation is not None, TURN=turn, HAS_A=a_out is not None,
        HAS_B=b_out is not None, B_TRANSPOSED=b_transposed,
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_N=tile[0],
        WINDOW=tile[1], R_PAD=r_pad, STAGES=3 if r_pad <= 64 else 2, OPEN=opens,
        num_warps=4 if seed is not None or p <= 64 else 8, num_stages=2, side=side,
    )  # fmt: skip
