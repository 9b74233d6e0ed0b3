"""The kernels' plan for wide ranks: H, T and the adapter's gradients by library products.

A rank above 64 is too much for the tiles that carry the LoRA term along. The kernels then run
without it, and every gradient of the adapter comes from one product over the tokens,

    F = dYᵀ X [N, K]:   dB = α F Aᵀ,  dA = α Bᵀ F,  ds = rowsum(F ⊙ (W D_b)),
                        dE_g = (s ⊙ W)_gᵀ F_g,

which is right for every s. F is rounded to bf16 where that is the compute dtype, as H and U Wᵀ are
elsewhere; fp16 may not hold its sums, and has it in fp32. With dropout F is not enough, and the
kernels carry the term after all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import MAX_FUSED_RANK, padded_rank
from prodial_kernels.ops.products import wide_product


def is_wide(lora_a: Tensor | None, seed: Tensor | None) -> bool:
    """Whether A [R, K] takes this plan; ``seed`` is None without dropout."""
    return lora_a is not None and seed is None and lora_a.shape[0] > MAX_FUSED_RANK


def tokens_of(matrix: Tensor) -> Tensor:
    """[M, F], or a copy of channel-first [b, F, l] as [M, F]."""
    return matrix if matrix.ndim == 2 else matrix.mT.reshape(-1, matrix.shape[1])


def add_low_rank(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float) -> Tensor:
    """``Y += α X Aᵀ Bᵀ`` in place; return H = X Aᵀ [M, padded R].

    Args:
        y: Y, [M, N] or channel-first [b, N, l].
        x: X, [M, K] or channel-first [b, K, l].
        lora_a: A, [R, K].
        lora_b: B, [N, R].
        alpha: α.
    """
    spare = padded_rank(lora_a.shape[0]) - lora_a.shape[0]
    a = F.pad(lora_a, (0, 0, 0, spare)).to(x.dtype)
    b = F.pad(alpha * lora_b, (0, spare)).to(x.dtype)
    h = (x if x.ndim == 2 else x.mT) @ a.T
    h = h.reshape(-1, a.shape[0])
    _add_product(y, h, b.T)
    return h


def add_low_rank_gradient(
    dx: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float
) -> None:
    """``dX += α dY B A`` in place; layouts as of X and Y in :func:`add_low_rank`."""
    t = (dy if dy.ndim == 2 else dy.mT) @ (alpha * lora_b).to(dy.dtype)
    _add_product(dx, t.reshape(-1, lora_a.shape[0]), lora_a.to(dy.dtype))


def product_of(dy: Tensor, x: Tensor) -> Tensor:
    """F = dYᵀ X [N, K] of either layouts: bf16 of bf16, fp32 of fp16."""
    left, right = tokens_of(dy).T, tokens_of(x)
    return left @ right if dy.dtype == torch.bfloat16 else wide_product(left, right)


def low_rank_gradients(
    product: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha: float,
    *,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dA and dB, those asked for, from F [N, K]."""
    da = db = None
    if need_a:
        da = (alpha * wide_product(lora_b.T.to(product.dtype), product)).to(lora_a.dtype)
    if need_b:
        db = (alpha * wide_product(product, lora_a.T.to(product.dtype))).to(lora_b.dtype)
    return da, db


def _add_product(target: Tensor, rows: Tensor, factor: Tensor) -> None:
    """``target += rows @ factor`` for a target [M, F], or channel-first [b, F, l]."""
    if target.ndim == 2:
        target.addmm_(rows, factor)
    else:
        batches, features, length = target.shape
        columns = rows.view(batches, length, -1).mT
        target.baddbmm_(factor.T.expand(batches, features, -1), columns)
