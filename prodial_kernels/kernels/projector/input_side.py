"""From dU to dX, and the gradients summed over tokens on the input side: A and D_b."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, block_window, split_tokens
from prodial_kernels.kernels.choices.tile_sizes import InputSideConfig
from prodial_kernels.kernels.projector.early_launch import open_way
from prodial_kernels.kernels.projector.tiles import (
    block_size_of,
    dropout_keep,
    load_deviation,
    store_deviation,
    token_pointers,
    token_shape,
)
from prodial_kernels.kernels.replay.recorder import launch


@triton.jit
def _input_side_kernel(
    du_ptr, x_ptr, t_ptr, a_ptr, blocks_ptr, seed_ptr,
    partial_a_ptr, partial_e_ptr,
    M, K, R, LENGTH,
    stride_du, stride_x, batch_du, batch_x, splits, dropout,
    P: tl.constexpr, RELU: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, HAS_LORA: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_X: tl.constexpr, NEED_A: tl.constexpr, NEED_BLOCKS: tl.constexpr,
    CHANNEL_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, WINDOW: tl.constexpr, R_PAD: tl.constexpr,
    STAGES: tl.constexpr, OPEN: tl.constexpr,
):  # fmt: skip
    """dX = dU + dU E + dropout(T A);  partial sums of Tᵀ dropout(X) = dA and dE_g = dU_gᵀ X_g.

    dU [M, K] is overwritten by dX. X [M, K], both [M / LENGTH, K, LENGTH] where CHANNEL_FIRST,
    T = α dY B [M, R_PAD], A [R, K],
    E = D_b − I from D_a [K / P, P, P];
    dA_part [splits, R_PAD, K], dE_part [splits, K / P, P, P].
    One program owns whole blocks within WINDOW columns of one split of the tokens: every
    ``splits``-th tile. All walk from the last tokens to the first, so that dU is met while L2 still
    holds what the product wrote last. OPEN: the next launch may begin early.
    """
    if OPEN:
        open_way()
    SPAN: tl.constexpr = (WINDOW // P) * P
    pid_k = tl.program_id(0)
    split = tl.program_id(1)
    lane = tl.arange(0, WINDOW)
    offs_k = pid_k * SPAN + lane
    mask_k = (lane < SPAN) & (offs_k < K)
    offs_r = tl.arange(0, R_PAD)
    tiles = tl.cdiv(M, BLOCK_M)

    if HAS_LORA:
        mask_a = (offs_r < R)[:, None] & mask_k[None, :]
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_a, other=0.0)
        a = a.to(x_ptr.dtype.element_ty)
        if NEED_A:
            if DROPOUT:
                acc_a = tl.zeros((R_PAD, WINDOW), dtype=tl.float32)
            else:
                acc_a = tl.zeros((WINDOW, R_PAD), dtype=tl.float32)
    if HAS_BLOCKS:
        if P == 1:
            d = 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, P, RELU)
            acc_e = tl.zeros((BLOCK_M, WINDOW), dtype=tl.float32)
        else:
            e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, P, RELU)
            e = e.to(x_ptr.dtype.element_ty)
            acc_e = tl.zeros((WINDOW, WINDOW), dtype=tl.float32)

    for tile in tl.range(split, tiles, splits, num_stages=STAGES):
        offs_m = (tiles - 1 - tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_k[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        if NEED_A or NEED_BLOCKS:
            source = token_pointers(x_ptr, offs_m, offs_k, LENGTH, stride_x, batch_x, CHANNEL_FIRST)
            x = tl.load(source, mask=mask, other=0.0)
        if NEED_X or NEED_BLOCKS:
            target = token_pointers(
                du_ptr, offs_m, offs_k, LENGTH, stride_du, batch_du, CHANNEL_FIRST
            )
            du = tl.load(target, mask=mask, other=0.0)
            dx = du.to(tl.float32)
        if HAS_BLOCKS and (NEED_X or NEED_BLOCKS):
            if P == 1:
                if NEED_BLOCKS:
                    acc_e += dx * x.to(tl.float32)
                dx *= d[None, :]
            else:
                if NEED_BLOCKS:
                    # [WINDOW, BLOCK_M] @ [BLOCK_M, WINDOW] -> [WINDOW, WINDOW]
                    acc_e = tl.dot(du.T, x, acc_e)
                # [BLOCK_M, WINDOW] @ [WINDOW, WINDOW] -> [BLOCK_M, WINDOW]
                dx += tl.dot(du, e)
        if HAS_LORA:
            t = tl.load(t_ptr + rows * R_PAD + offs_r[None, :], mask=mask_m[:, None], other=0.0)
            if DROPOUT:
                keep = dropout_keep(seed_ptr, rows, offs_k[None, :], K, dropout)
            if NEED_A:
                if DROPOUT:
                    kept = tl.where(keep, x.to(tl.float32) / (1 - dropout), 0.0).to(x.dtype)
                    # [R_PAD, BLOCK_M] @ [BLOCK_M, WINDOW] -> [R_PAD, WINDOW]; this way round the
                    # masked X is the right operand, which wgmma never takes from registers.
                    acc_a = tl.dot(t.T, kept, acc_a)
                else:
                    # [WINDOW, BLOCK_M] @ [BLOCK_M, R_PAD] -> [WINDOW, R_PAD]; T as it lies, as
                    # below: in one layout the compiler fetches it ahead, in two it does not.
                    acc_a = tl.dot(x.T, t, acc_a)
            if NEED_X:
                # [BLOCK_M, R_PAD] @ [R_PAD, WINDOW] -> [BLOCK_M, WINDOW]
                low_rank = tl.dot(t, a)
                if DROPOUT:
                    low_rank = tl.where(keep, low_rank / (1 - dropout), 0.0)
                dx += low_rank
        if NEED_X:
            tl.store(target, dx.to(du_ptr.dtype.element_ty), mask=mask)

    if HAS_LORA and NEED_A:
        target = partial_a_ptr + (split.to(tl.int64) * R_PAD + offs_r)[:, None] * K
        if not DROPOUT:
            acc_a = acc_a.T
        tl.store(target + offs_k[None, :], acc_a, mask=mask_k[None, :])
    if HAS_BLOCKS and NEED_BLOCKS:
        store_deviation(partial_e_ptr, split, acc_e, offs_k, mask_k, K, P)


def launch_input_side(
    du: Tensor | None,
    x: Tensor,
    t: Tensor | None,
    lora_a: Tensor | None,
    blocks: Tensor | None,
    *,
    seed: Tensor | None,
    dropout: float,
    relu: bool,
    need_x: bool,
    need_a: bool,
    need_blocks: bool,
    config: InputSideConfig,
    opens: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Turn ``du`` into dX in place where ``need_x``; return the fp32 parts (dA, dE).

    ``du`` and ``x`` are both [M, K], or both channel-first [b, K, l]. ``opens`` lets the next
    launch begin early.
    """
    m, k = token_shape(x)
    p = block_size_of(blocks)
    r_pad = t.shape[1] if t is not None else 16
    window = block_window(config.window, p)
    columns = block_programs(k, window, p)
    splits, _ = split_tokens(m, columns, config.block_m, config.programs)

    def partial(*shape: int) -> Tensor:
        return torch.empty((splits, *shape), dtype=torch.float32, device=x.device)

    partial_a = partial(r_pad, k) if need_a else None
    partial_e = partial(*blocks.shape) if need_blocks and blocks is not None else None
    launch(
        _input_side_kernel, (columns, splits),
        du, x, t, lora_a, blocks, seed, partial_a, partial_e,
        m, k, 0 if lora_a is None else lora_a.shape[0], x.shape[2] if x.ndim == 3 else m,
        0 if du is None else du.stride(-2), x.stride(-2),
        0 if du is None else du.stride(0), x.stride(0), splits, dropout,
        P=p, RELU=relu, HAS_BLOCKS=blocks is not None, HAS_LORA=t is not None,
        DROPOUT=seed is not None,
        NEED_X=need_x, NEED_A=need_a, NEED_BLOCKS=need_blocks, CHANNEL_FIRST=x.ndim == 3,
        BLOCK_M=config.block_m, WINDOW=window, R_PAD=r_pad,
        STAGES=config.num_stages, OPEN=opens, num_warps=config.num_warps, num_stages=2,
    )  # fmt: skip
    return partial_a, partial_e
