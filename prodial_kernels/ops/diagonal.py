"""The block-diagonal factor: from the paper's trained D_a to D_b, kept as its deviation from I.

D_b stays near the identity, where 16-bit formats resolve only 2^-8; its deviation E = D_b − I is
small, so casting E (never D_b) to the compute dtype keeps small updates alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prodial_kernels.ops.products import wide_product


def deviation(blocks: Tensor, diagonal: str) -> Tensor:
    """Return E = D_b − I for the trained blocks D_a, [n_blocks, P, P], in their dtype.

    ``"relu"`` is Eq. 7, ``D_b = [I − relu(I∘D_a)] + (1−I)∘D_a``; ``"free"`` is ``D_b = I + D_a``.
    The relu's subgradient at 0 is 1 (PyTorch's own is 0, which would freeze a diagonal that
    starts at 0 for ever). Differentiable by autograd.
    """
    if diagonal == "free":
        return blocks
    on_diagonal = _diagonal_mask(blocks)
    # where(a < 0, 0, a) rather than relu: derivative 1 at a = 0, and NaN passes through.
    lowered = -torch.where(blocks < 0, torch.zeros_like(blocks), blocks)
    return torch.where(on_diagonal, lowered, blocks)


def deviation_backward(grad_deviation: Tensor, blocks: Tensor, diagonal: str) -> Tensor:
    """Return the gradient towards D_a from the gradient towards E, both [n_blocks, P, P]."""
    if diagonal == "free":
        return grad_deviation
    lowered = torch.where(blocks < 0, torch.zeros_like(grad_deviation), -grad_deviation)
    return torch.where(_diagonal_mask(blocks), lowered, grad_deviation)


def rotate(x: Tensor, deviation: Tensor, *, transpose: bool = False) -> Tensor:
    """Apply D_b = I + E block by block to the last axis of ``x``, [..., n_blocks · P].

    ``transpose=False`` computes ``U = X D_bᵀ`` (forward), ``transpose=True`` computes
    ``dX = dU D_b`` (backward), in the dtype of ``x``. E is [n_blocks, P, P] in any floating dtype.
    """
    n_blocks, block_size, _ = deviation.shape
    if block_size == 1:
        return (x * (1 + deviation.reshape(-1))).to(x.dtype)
    blocked = x.reshape(*x.shape[:-1], n_blocks, block_size)
    equation = "...go,goi->...gi" if transpose else "...gi,goi->...go"
    turned = torch.einsum(equation, blocked, deviation.to(x.dtype))
    return (blocked + turned).reshape(x.shape)


def rotate_weight(weight: Tensor, deviation: Tensor) -> Tensor:
    """Return ``W D_b``, [N, K], for a weight [N, K] and E [n_blocks, P, P]."""
    return rotate(weight, deviation, transpose=True)


def block_outer_product(grad_u: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Return ``dD_g = dU_gᵀ X_g`` for every block: [M, K], [M, K] -> [K / P, P, P].

    In fp32, of fp64 operands in fp64: the sum over the tokens is for the caller to round.
    """
    tokens, width = x.shape
    if block_size == 1:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (grad_u.to(wide) * x).sum(0).reshape(width, 1, 1)
    n_blocks = width // block_size
    grad_blocked = grad_u.reshape(tokens, n_blocks, block_size)
    blocked = x.reshape(tokens, n_blocks, block_size)
    # [G, P, M] @ [G, M, P] -> [G, P, P]
    return wide_product(grad_blocked.permute(1, 2, 0), blocked.permute(1, 0, 2))


def _diagonal_mask(blocks: Tensor) -> Tensor:
    return torch.eye(blocks.shape[-1], dtype=torch.bool, device=blocks.device)
