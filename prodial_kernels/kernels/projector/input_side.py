"""From dU to dX, and the gradients summed over tokens on the input side: A and D_b."""

from functools import partial
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, block_window, split_tokens
from prodial_kernels.kernels.choices.tile_sizes import InputSideConfig
from prodial_kernels.kernels.projector.operands import Needs, Operands, ProjectionOptions
from prodial_kernels.kernels.projector.pdl import trigger_next
from prodial_kernels.kernels.projector.tiles import (
    WalkTile,
    apply_diagonal,
    block_size_of,
    deviation_sums,
    diagonal_of,
    dropout_keep,
    load_factor,
    partial_sums,
    store_deviation,
    token_pointers,
    token_shape,
    window_columns,
)
from prodial_kernels.kernels.replay.recorder import launch


@triton.jit
def _input_side_kernel(
    du_ptr, x_ptr, t_ptr, a_ptr, blocks_ptr, seed_ptr,
    partial_a_ptr, partial_e_ptr,
    M, K, R, LENGTH,
    stride_du, stride_x, batch_du, batch_x, splits, dropout,
    NEED_X: tl.constexpr, CHANNEL_FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
    TILE: tl.constexpr, TRIGGERS_NEXT: tl.constexpr,
):  # fmt: skip
    """dX = dU D_b + dropout(T A);  partial sums of dA = Tᵀ dropout(X) and dE_g = dU_gᵀ X_g.

    dU [M, K] is overwritten by dX where NEED_X. X [M, K], both [M / LENGTH, K, LENGTH] where
    CHANNEL_FIRST, T = α dY B [M, R_PAD], A [R, K], D_b from D_a [K / P, P, P];
    dA_part [splits, R_PAD, K], dE_part [splits, K / P, P, P]. What is None has no part in it.
    A program owns whole blocks within ``window`` columns of one split of the tokens: every
    ``splits``-th tile. All walk from the last tokens to the first, so that dU is read while L2
    still holds what the product wrote last. TRIGGERS_NEXT: a PDL launch may follow.
    """
    if TRIGGERS_NEXT:
        trigger_next()
    P: tl.constexpr = DIAGONAL.p
    BLOCK_M: tl.constexpr = TILE.rows
    WINDOW: tl.constexpr = TILE.columns
    R_PAD: tl.constexpr = TILE.rank
    HAS_BLOCKS: tl.constexpr = blocks_ptr is not None
    HAS_LORA: tl.constexpr = t_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    NEED_A: tl.constexpr = partial_a_ptr is not None
    NEED_BLOCKS: tl.constexpr = partial_e_ptr is not None
    pid_k = tl.program_id(0)
    split = tl.program_id(1)
    offs_k, mask_k = window_columns(pid_k, K, P, WINDOW)
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
        factor = load_factor(blocks_ptr, offs_k, K, x_ptr.dtype.element_ty, DIAGONAL, False)
        acc_e = deviation_sums(BLOCK_M, WINDOW, P)

    for tile in tl.range(split, tiles, splits, num_stages=TILE.stages):
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
            if NEED_BLOCKS:
                if P == 1:
                    acc_e += dx * x.to(tl.float32)
                else:
                    # [WINDOW, BLOCK_M] @ [BLOCK_M, WINDOW] -> [WINDOW, WINDOW]
                    acc_e = tl.dot(du.T, x, acc_e)
            dx = apply_diagonal(du, dx, factor, P)
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
                    # below: in one layout the compiler prefetches it, in two it does not.
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
    operands: Operands,
    options: ProjectionOptions,
    *,
    need_x: bool,
    need_a: bool,
    need_blocks: bool,
    config: InputSideConfig,
    triggers_next: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Overwrite ``du`` by dX where ``need_x``; return the fp32 parts (dA, dE).

    Args:
        du: dU, like ``x``.
        x: X, [M, K] or channel-first [b, K, l].
        t: T, [M, R_PAD], or None for no LoRA term.
        operands: D_a or None for none, A where ``t`` is given, the seed or None for no dropout.
        options: The dropout, and how D_b is made of D_a.
        need_x: Whether dX is asked for.
        need_a: Whether dA is.
        need_blocks: Whether dE is.
        config: Tile sizes.
        triggers_next: Whether a PDL launch follows.
    """
    blocks, lora_a = operands.blocks, operands.lora_a
    m, k = token_shape(x)
    diagonal = diagonal_of(blocks, options)
    r_pad = t.shape[1] if t is not None else 16
    window = block_window(config.window, diagonal.p)
    columns = block_programs(k, window, diagonal.p)
    splits, _ = split_tokens(m, columns, config.block_m, config.programs)
    partial_a = partial_sums(splits, r_pad, k, device=x.device) if need_a else None
    partial_e = None
    if need_blocks and blocks is not None:
        partial_e = partial_sums(splits, *blocks.shape, device=x.device)
    channel_first = x.ndim == 3
    launch(
        _input_side_kernel, (columns, splits),
        du_ptr=du, x_ptr=x, t_ptr=t, a_ptr=lora_a, blocks_ptr=blocks, seed_ptr=operands.noise,
        partial_a_ptr=partial_a, partial_e_ptr=partial_e,
        M=m, K=k, R=0 if lora_a is None else lora_a.shape[0],
        LENGTH=x.shape[2] if channel_first else m,
        stride_du=0 if du is None else du.stride(-2), stride_x=x.stride(-2),
        batch_du=0 if du is None else du.stride(0), batch_x=x.stride(0),
        splits=splits, dropout=options.lora_dropout,
        NEED_X=need_x, CHANNEL_FIRST=channel_first, DIAGONAL=diagonal,
        TILE=WalkTile(config.block_m, window, r_pad, config.num_stages),
        TRIGGERS_NEXT=triggers_next, num_warps=config.num_warps, num_stages=2,
    )  # fmt: skip
    return partial_a, partial_e


class InputSums(NamedTuple):
    """What :func:`launch_reduce` adds up: fp32 parts of dA and dE; None where not needed."""

    a: Tensor | None = None
    blocks: Tensor | None = None
    launched: bool = False


def launch_input_sums(
    du: Tensor | None,
    x: Tensor,
    t: Tensor | None,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
    *,
    config: InputSideConfig,
    triggers_next: bool,
) -> InputSums:
    """Overwrite ``du`` by dX where that is needed, and sum over the tokens of X.

    Shapes and ``triggers_next`` as in :func:`launch_input_side`; ``needs`` asks only for parts that
    ``operands`` have.
    """
    blocks, seed = operands.blocks, operands.noise
    changes_x = needs.x and (blocks is not None or t is not None)
    if not (changes_x or needs.lora_a or needs.blocks):
        return InputSums()
    walk = partial(
        launch_input_side, x=x, options=options, config=config, triggers_next=triggers_next
    )
    # A wide block beside a wide rank is too much for one program: then dA, which reads no dU,
    # the blocks' part of dX and the LoRA part come one after the other.
    if t is None or seed is None or block_size_of(blocks) <= 64 or t.shape[1] <= 32:
        parts = walk(
            du, t=t, operands=operands, need_x=changes_x, need_a=needs.lora_a,
            need_blocks=needs.blocks,
        )  # fmt: skip
        return InputSums(*parts, launched=True)
    partial_a = partial_e = None
    if needs.lora_a:
        partial_a, _ = walk(
            None, t=t, operands=operands, need_x=False, need_a=True, need_blocks=False
        )
    if changes_x or needs.blocks:
        alone = operands._replace(lora_a=None, noise=None)
        _, partial_e = walk(
            du, t=None, operands=alone, need_x=needs.x, need_a=False, need_blocks=needs.blocks
        )
    if needs.x:
        alone = operands._replace(blocks=None)
        walk(du, t=t, operands=alone, need_x=True, need_a=False, need_blocks=False)
    return InputSums(partial_a, partial_e, launched=True)
