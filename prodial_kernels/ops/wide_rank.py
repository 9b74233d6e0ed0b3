"""The kernels' plan for wide ranks: H, T and the adapter's gradients by library products.

A rank above 64 is too much for the tiles that carry the LoRA term along. The kernels then run
without it, and every gradient of the adapter comes from one product over the tokens,

    F = dYᵀ X [N, K]:   dB = α F Aᵀ,  dA = α Bᵀ F,  ds = rowsum(F ⊙ (W D_b)),
                        dE_g = (s ⊙ W)_gᵀ F_g,

which is exact for every s. With dropout F is not enough, and the kernels carry the term after all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.kernels.launch import MAX_FUSED_RANK, padded_rank
from prodial_kernels.ops.dense_blocks import turned_weight
from prodial_kernels.ops.diagonal import block_outer_product, deviation_backward


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


class AdapterGradients(NamedTuple):
    """Towards each trained part; None where not asked for."""

    blocks: Tensor | None
    scale: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def adapter_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha: float,
    relu: bool,
    *,
    need_blocks: bool,
    need_scale: bool,
    need_a: bool,
    need_b: bool,
) -> AdapterGradients:
    """Return the gradients that are asked for, from dY and X in either layout."""
    dblocks = dscale = da = db = None
    if need_blocks or need_scale or need_a or need_b:
        product = _wide_product(tokens_of(dy).T, tokens_of(x))
        if need_b:
            db = (alpha * (product @ lora_a.float().T)).to(lora_b.dtype)
        if need_a:
            da = (alpha * (lora_b.float().T @ product)).to(lora_a.dtype)
        if need_scale and scale is not None:
            turned = weight if blocks is None else turned_weight(weight, blocks, relu)
            dscale = (product * turned).sum(1).to(scale.dtype)
        if need_blocks and blocks is not None:
            scaled = weight.float() if scale is None else weight * scale.float()[:, None]
            de = block_outer_product(scaled, product, blocks.shape[-1])
            dblocks = deviation_backward(de.to(blocks.dtype), blocks, "relu" if relu else "free")
    return AdapterGradients(dblocks, dscale, da, db)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of 16-bit matrices, in fp32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(target: Tensor, rows: Tensor, factor: Tensor) -> None:
    """``target += rows @ factor`` for a target [M, F], or channel-first [b, F, l]."""
    if target.ndim == 2:
        target.addmm_(rows, factor)
    else:
        batches, features, length = target.shape
        columns = rows.view(batches, length, -1).mT
        target.baddbmm_(factor.T.expand(batches, features, -1), columns)
