"""What the kernels' tiles do not hold, by library products: large blocks and wide ranks.

*Diagonal blocks larger than a tile*, up to P = K. ``W D_b`` is a library product then, and takes
the frozen weight's place in the kernels, which are given no blocks. Backward makes it again, and
``dU = (dY ⊙ s) W`` for the blocks' gradient.

*Ranks above 64.* The kernels run without the low-rank term. Up to 128, of weights that are large
either way, the output side still sums what dB and ds need, and library products make T, dA = Tᵀ X
and T A. Otherwise every gradient of the adapter comes from one product over the tokens,

    F = dYᵀ X [N, K]:   dB = α F Aᵀ,  dA = α Bᵀ F,  ds = rowsum(F ⊙ (W D_b)),
                        dE_g = (s ⊙ W)_gᵀ F_g,

which is right for every s. F is rounded to bf16 where that is the compute dtype, as H and U Wᵀ are
elsewhere; fp16 may not hold its sums, and has it in fp32. With dropout F is not enough, and the
kernels compute the term after all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.kernels.choices import small_weight
from prodial_kernels.kernels.choices.tile_sizes import MAX_FUSED_RANK, padded_rank
from prodial_kernels.kernels.projector.operands import Needs, Operands, ProjectionOptions
from prodial_kernels.ops.diagonal import (
    block_outer_product,
    deviation,
    deviation_backward,
    rotate_weight,
)
from prodial_kernels.ops.products import wide_product
from prodial_kernels.ops.reference import scale_of

MAX_TILED_BLOCK = 128
"""The largest P that the kernels hold in a tile."""


# --- Large blocks. ------------------------------------------------------------------------------


def is_dense(blocks: Tensor | None) -> bool:
    """Whether the blocks D_a [K / P, P, P] are too large for a tile."""
    return blocks is not None and blocks.shape[-1] > MAX_TILED_BLOCK


def tiled(operands: Operands, options: ProjectionOptions) -> Operands:
    """Return operands that the kernels hold: ``W D_b`` in W's place where blocks are large.

    That weight is transient, never kept for backward.
    """
    blocks = operands.blocks
    if blocks is None or not is_dense(blocks):
        return operands
    weight = rotate_weight(operands.weight, deviation(blocks, options.diagonal))
    return operands._replace(weight=weight, blocks=None)


def dense_blocks_gradient(
    dy: Tensor, x: Tensor, operands: Operands, options: ProjectionOptions
) -> Tensor | None:
    """Return dD_a, [K / P, P, P], from dY [M, N] and X [M, K]; None without blocks."""
    blocks = operands.blocks
    if blocks is None:
        return None
    weight = operands.weight
    if operands.scale_deviation is not None:
        weight = (weight * scale_of(operands.scale_deviation)[:, None]).to(weight.dtype)
    de = block_outer_product(dy @ weight, x, blocks.shape[-1])
    return deviation_backward(de.to(blocks.dtype), blocks, options.diagonal)


# --- Wide ranks. --------------------------------------------------------------------------------


def is_wide(operands: Operands) -> bool:
    """Whether the rank of A [R, K] is too wide for the kernels' tiles, without dropout."""
    lora_a = operands.lora_a
    return lora_a is not None and operands.noise is None and lora_a.shape[0] > MAX_FUSED_RANK


# What the output side's tile holds, and from which size on F costs more than the passes over dY, Y
# and X that it spares: the smaller side of the weight, measured on an H200.
MAX_THIN_RANK, LEAST_THIN = 128, 1024


def is_thin(operands: Operands) -> bool:
    """Whether the gradients of a wide rank come from thin products instead of F."""
    lora_a = operands.lora_a
    return (
        is_wide(operands)
        and lora_a is not None
        and lora_a.shape[0] <= MAX_THIN_RANK
        and min(operands.weight.shape) >= LEAST_THIN
    )


def is_small(x: Tensor, operands: Operands) -> bool:
    """Whether the weight is nothing beside X [M, K], and X not channel-first.

    Then every gradient of the adapter comes from F, and W' is made for each of the two products.
    """
    blocks, lora_a = operands.blocks, operands.lora_a
    n, k = operands.weight.shape
    return x.ndim == 2 and small_weight.is_small(
        x.shape[0], n, k, r=0 if lora_a is None else lora_a.shape[0],
        block_size=0 if blocks is None else blocks.shape[-1], dropout=operands.noise is not None,
    )  # fmt: skip


def tokens_of(matrix: Tensor) -> Tensor:
    """[M, F], or a copy of channel-first [b, F, l] as [M, F]."""
    return matrix if matrix.ndim == 2 else matrix.mT.reshape(-1, matrix.shape[1])


def low_rank_factors(x: Tensor, operands: Operands, alpha: float) -> tuple[Tensor, Tensor]:
    """Return H = X Aᵀ, [M, padded R], and α B, [N, padded R], for X [M, K] or channel-first."""
    lora_a, lora_b = _low_rank(operands)
    spare = padded_rank(lora_a.shape[0]) - lora_a.shape[0]
    a = F.pad(lora_a, (0, 0, 0, spare)).to(x.dtype)
    b = F.pad(alpha * lora_b, (0, spare)).to(x.dtype)
    h = (x if x.ndim == 2 else x.mT) @ a.T
    return h.reshape(-1, a.shape[0]), b


def add_low_rank(y: Tensor, h: Tensor, b: Tensor) -> None:
    """``Y += H (α B)ᵀ`` in place, for Y [M, N] or channel-first [b, N, l]."""
    _add_product(y, h, b.T)


def add_low_rank_gradient(dx: Tensor, dy: Tensor, operands: Operands, alpha: float) -> None:
    """``dX += α dY B A`` in place; dX [M, K] or channel-first [b, K, l], dY likewise."""
    lora_a, lora_b = _low_rank(operands)
    t = (dy if dy.ndim == 2 else dy.mT) @ (alpha * lora_b).to(dy.dtype)
    _add_product(dx, t.reshape(-1, lora_a.shape[0]), lora_a.to(dy.dtype))


def thin_gradients(
    dx: Tensor | None, dy: Tensor, x: Tensor, operands: Operands, alpha: float, needs: Needs
) -> Tensor | None:
    """``dX += T A`` in place with T = α dY B, where there is a dX; return dA = Tᵀ X if asked for.

    dX and X [M, K] or channel-first [b, K, l], dY likewise.
    """
    if not (needs.x or needs.lora_a):
        return None
    lora_a, lora_b = _low_rank(operands)
    t = (dy if dy.ndim == 2 else dy.mT) @ (alpha * lora_b).to(dy.dtype)
    t = t.reshape(-1, lora_a.shape[0])
    if dx is not None:
        _add_product(dx, t, lora_a.to(dy.dtype))
    return wide_product(t.T, tokens_of(x)).to(lora_a.dtype) if needs.lora_a else None


def product_of(dy: Tensor, x: Tensor) -> Tensor:
    """F = dYᵀ X [N, K] of either layouts: bf16 of bf16, fp32 of fp16."""
    left, right = tokens_of(dy).T, tokens_of(x)
    return left @ right if dy.dtype == torch.bfloat16 else wide_product(left, right)


def low_rank_gradients(
    product: Tensor, operands: Operands, alpha: float, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return dA and dB, those asked for, from F [N, K]."""
    lora_a, lora_b = _low_rank(operands)
    da = db = None
    if needs.lora_a:
        da = (alpha * wide_product(lora_b.T.to(product.dtype), product)).to(lora_a.dtype)
    if needs.lora_b:
        db = (alpha * wide_product(product, lora_a.T.to(product.dtype))).to(lora_b.dtype)
    return da, db


def _low_rank(operands: Operands) -> tuple[Tensor, Tensor]:
    if operands.lora_a is None or operands.lora_b is None:
        raise ValueError("operands: A and B are asked for, and there are none")
    return operands.lora_a, operands.lora_b


def _add_product(target: Tensor, rows: Tensor, factor: Tensor) -> None:
    """``target += rows @ factor`` for a target [M, F], or channel-first [b, F, l]."""
    if target.ndim == 2:
        target.addmm_(rows, factor)
    else:
        batches, features, length = target.shape
        columns = rows.view(batches, length, -1).mT
        target.baddbmm_(factor.T.expand(batches, features, -1), columns)
