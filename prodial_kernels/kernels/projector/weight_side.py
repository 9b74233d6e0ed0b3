"""From F = dYᵀ X, the sums over the weight: gradients of s and the blocks, of A and B if asked."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, block_window, split_tokens
from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.kernels.projector.operands import Needs, Operands, ProjectionOptions
from prodial_kernels.kernels.projector.tiles import (
    WalkTile,
    apply_diagonal,
    deviation_sums,
    diagonal_of,
    load_factor,
    partial_sums,
    store_deviation,
    window_columns,
)
from prodial_kernels.kernels.replay.recorder import launch

# Columns of a tile, loads in flight, and programs that share the rows.
WINDOW, STAGES, PROGRAMS = 64, 3, 264


@triton.jit
def _weight_side_kernel(
    f_ptr, w_ptr, blocks_ptr, deviation_ptr, a_ptr, b_ptr,
    partial_scale_ptr, partial_e_ptr, partial_a_ptr, partial_b_ptr,
    N, K, R, alpha, stride_f, stride_w, splits, parts,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds = rowsum(F ⊙ (W D_b)), dE_g = (s ⊙ W)_gᵀ F_g, dB = F Aᵀ and dA = α Bᵀ F.

    F is the sum over ``parts`` matrices [N, K], one behind the other. W [N, K], D_b from
    D_a [K / P, P, P], s − 1 [N], A [R, K], B [N, R]; ds_part [windows, N], dE_part [splits, K / P,
    P, P], dB_part [windows, N, R_PAD], dA_part [splits, R_PAD, K]; None: not asked for.
    A program owns whole blocks within ``window`` columns and every ``splits``-th tile of rows.
    """
    P: tl.constexpr = DIAGONAL.p
    BLOCK_N: tl.constexpr = TILE.rows
    WINDOW: tl.constexpr = TILE.columns
    R_PAD: tl.constexpr = TILE.rank
    pid_k = tl.program_id(0)
    split = tl.program_id(1)
    offs_k, mask_k = window_columns(pid_k, K, P, WINDOW)

    if blocks_ptr is not None:
        factor = load_factor(blocks_ptr, offs_k, K, w_ptr.dtype.element_ty, DIAGONAL, False)
        acc_e = deviation_sums(BLOCK_N, WINDOW, P)
    if partial_b_ptr is not None or partial_a_ptr is not None:
        offs_r = tl.arange(0, R_PAD)
    if partial_b_ptr is not None:
        mask_a = (offs_r < R)[:, None] & mask_k[None, :]
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_a, other=0.0)
        a = a.to(tl.float32)
    if partial_a_ptr is not None:
        acc_a = tl.zeros((R_PAD, WINDOW), dtype=tl.float32)

    for tile in tl.range(split, tl.cdiv(N, BLOCK_N), splits, num_stages=TILE.stages):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = offs_n.to(tl.int64)[:, None]
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_k[None, :]
        source = f_ptr + rows * stride_f + offs_k[None, :]
        f = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        for part in range(1, parts):
            f += tl.load(source + part * N * K, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows * stride_w + offs_k[None, :], mask=mask, other=0.0)
        if partial_scale_ptr is not None:
            wd = w.to(tl.float32)
            if blocks_ptr is not None:
                wd = apply_diagonal(w, wd, factor, P)
            target = partial_scale_ptr + pid_k.to(tl.int64) * N + offs_n
            tl.store(target, tl.sum(f * wd, 1), mask=mask_n)
        if partial_b_ptr is not None:
            # [BLOCK_N, WINDOW] @ [WINDOW, R_PAD] -> [BLOCK_N, R_PAD]
            target = partial_b_ptr + (pid_k.to(tl.int64) * N + rows) * R_PAD + offs_r[None, :]
            db = tl.dot(f, a.T, input_precision="ieee")
            tl.store(target, db, mask=mask_n[:, None])
        if partial_a_ptr is not None:
            mask_b = mask_n[:, None] & (offs_r < R)[None, :]
            b = tl.load(b_ptr + rows * R + offs_r[None, :], mask=mask_b, other=0.0)
            # [R_PAD, BLOCK_N] @ [BLOCK_N, WINDOW] -> [R_PAD, WINDOW]
            acc_a = tl.dot((b.to(tl.float32) * alpha).T, f, acc_a, input_precision="ieee")
        if partial_e_ptr is not None:
            if deviation_ptr is not None:
                shift = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                f *= 1 + shift[:, None]
            if P == 1:
                acc_e += w.to(tl.float32) * f
            else:
                # fp16 may not hold F, but its share of the tile's largest element.
                largest = tl.maximum(tl.max(tl.abs(f)), 1e-30)
                # [WINDOW, BLOCK_N] @ [BLOCK_N, WINDOW] -> [WINDOW, WINDOW]
                acc_e += largest * tl.dot(w.T, (f / largest).to(w.dtype))

    if partial_a_ptr is not None:
        target = partial_a_ptr + (split.to(tl.int64) * R_PAD + offs_r)[:, None] * K
        tl.store(target + offs_k[None, :], acc_a, mask=mask_k[None, :])
    if partial_e_ptr is not None:
        store_deviation(partial_e_ptr, split, acc_e, offs_k, mask_k, K, P)


class WeightSums(NamedTuple):
    """What :func:`launch_reduce` adds up, fp32; None where not asked for.

    Attributes:
        scale: ds, [windows, N].
        blocks: dE, [splits, K / P, P, P].
        a: dA, [splits, R_PAD, K].
        b: dB without α, [windows, N, R_PAD].
    """

    scale: Tensor | None = None
    blocks: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def launch_weight_side(
    f: Tensor, operands: Operands, options: ProjectionOptions, needs: Needs
) -> WeightSums:
    """Return the parts that ``needs`` asks for.

    ``f`` is F [N, K], fp32 or 16-bit with unit inner stride like the weight, or parts of it,
    [parts, N, K], contiguous; A and B of a rank up to 64.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, *_ = operands
    n, k = weight.shape
    diagonal = diagonal_of(blocks, options)
    p = diagonal.p
    r = 0 if lora_a is None else lora_a.shape[0]
    r_pad = padded_rank(r)
    window = block_window(WINDOW, p)
    columns = block_programs(k, window, p)
    # The sums of a wide block leave registers for few rows, as those of A and B do.
    block_n = 16 if p > 64 or f.ndim == 3 else 32
    splits, _ = split_tokens(n, columns, block_n, PROGRAMS)
    partial_scale = partial_sums(columns, n, device=f.device) if needs.scale else None
    partial_b = partial_sums(columns, n, r_pad, device=f.device) if needs.lora_b else None
    partial_a = partial_sums(splits, r_pad, k, device=f.device) if needs.lora_a else None
    partial_e = None
    if needs.blocks and blocks is not None:
        partial_e = partial_sums(splits, *blocks.shape, device=f.device)
    launch(
        _weight_side_kernel, (columns, splits),
        f_ptr=f, w_ptr=weight, blocks_ptr=blocks, deviation_ptr=scale_deviation,
        a_ptr=lora_a, b_ptr=lora_b,
        partial_scale_ptr=partial_scale, partial_e_ptr=partial_e,
        partial_a_ptr=partial_a, partial_b_ptr=partial_b,
        N=n, K=k, R=r, alpha=options.lora_scaling, stride_f=f.stride(-2),
        stride_w=weight.stride(0), splits=splits, parts=f.shape[0] if f.ndim == 3 else 1,
        DIAGONAL=diagonal, TILE=WalkTile(block_n, window, r_pad, STAGES),
        num_warps=4 if p <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return WeightSums(partial_scale, partial_e, partial_a, partial_b)
