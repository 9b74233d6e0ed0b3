"""From F = dYᵀ X, the sums over the weight: ds and the blocks' gradient in one read of F and W."""

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, block_window, split_tokens
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
    f_ptr, w_ptr, blocks_ptr, deviation_ptr, partial_scale_ptr, partial_e_ptr,
    N, K, stride_f, stride_w, splits,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds = rowsum(F ⊙ (W D_b)) and dE_g = (s ⊙ W)_gᵀ F_g; None: not asked for.

    F, W [N, K], D_b from D_a [K / P, P, P], s − 1 [N];
    ds_part [windows, N], dE_part [splits, K / P, P, P].
    A program owns whole blocks within ``window`` columns and every ``splits``-th tile of rows.
    """
    P: tl.constexpr = DIAGONAL.p
    BLOCK_N: tl.constexpr = TILE.rows
    WINDOW: tl.constexpr = TILE.columns
    pid_k = tl.program_id(0)
    split = tl.program_id(1)
    offs_k, mask_k = window_columns(pid_k, K, P, WINDOW)

    if blocks_ptr is not None:
        factor = load_factor(blocks_ptr, offs_k, K, w_ptr.dtype.element_ty, DIAGONAL, False)
        acc_e = deviation_sums(BLOCK_N, WINDOW, P)

    for tile in tl.range(split, tl.cdiv(N, BLOCK_N), splits, num_stages=TILE.stages):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = offs_n.to(tl.int64)[:, None]
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_k[None, :]
        f = tl.load(f_ptr + rows * stride_f + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows * stride_w + offs_k[None, :], mask=mask, other=0.0)
        if partial_scale_ptr is not None:
            wd = w.to(tl.float32)
            if blocks_ptr is not None:
                wd = apply_diagonal(w, wd, factor, P)
            target = partial_scale_ptr + pid_k.to(tl.int64) * N + offs_n
            tl.store(target, tl.sum(f * wd, 1), mask=mask_n)
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

    if partial_e_ptr is not None:
        store_deviation(partial_e_ptr, split, acc_e, offs_k, mask_k, K, P)


def launch_weight_side(
    f: Tensor, operands: Operands, options: ProjectionOptions, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return the fp32 parts (ds [windows, N], dE [splits, K / P, P, P]) that ``needs`` asks for.

    ``f`` [N, K] is fp32 or 16-bit, with unit inner stride like the weight.
    """
    weight, blocks, scale_deviation, *_ = operands
    n, k = weight.shape
    diagonal = diagonal_of(blocks, options)
    p = diagonal.p
    window = block_window(WINDOW, p)
    columns = block_programs(k, window, p)
    # The sums of a wide block leave registers for few rows.
    block_n = 32 if p <= 64 else 16
    splits, _ = split_tokens(n, columns, block_n, PROGRAMS)
    partial_scale = partial_sums(columns, n, device=f.device) if needs.scale else None
    partial_e = None
    if needs.blocks and blocks is not None:
        partial_e = partial_sums(splits, *blocks.shape, device=f.device)
    launch(
        _weight_side_kernel, (columns, splits),
        f_ptr=f, w_ptr=weight, blocks_ptr=blocks, deviation_ptr=scale_deviation,
        partial_scale_ptr=partial_scale, partial_e_ptr=partial_e,
        N=n, K=k, stride_f=f.stride(0), stride_w=weight.stride(0), splits=splits,
        DIAGONAL=diagonal, TILE=WalkTile(block_n, window, 16, STAGES),
        num_warps=4 if p <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return partial_scale, partial_e
