"""The definition of the operation, in plain PyTorch autograd. Kept for ever, never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.ops.diagonal import deviation, rotate, rotate_weight
from prodial_kernels.ops.fp8.rounding import fp8_product


def reference_linear(x: Tensor, operands: Operands, options: ProjectionOptions) -> Tensor:
    """``Y = s ⊙ ((X D_bᵀ) Wᵀ) + α dropout(X) Aᵀ Bᵀ + bias`` (Eq. 7 of the paper).

    Products of matrices run in the dtype of ``x``; the scale and a pure diagonal are applied in
    the wider of their own dtype and that of ``x``, so that fp32 masters keep their resolution, and
    the scale, which is one more than what is stored, in fp32 at least. With ``compute="fp8"`` U and
    dY ⊙ s are rounded by :func:`~prodial_kernels.ops.fp8.rounding.rounded` before W's products.

    Args:
        x: [..., K].
        operands: The weight in the dtype of ``x``; ``noise`` a mask like ``x``, or None.
        options: α, the probability with which the mask was drawn, and the kind of diagonal.

    Returns:
        [..., N], dtype of ``x``.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, bias, mask = operands
    u = x if blocks is None else rotate(x, deviation(blocks, options.diagonal))
    y = fp8_product(u, weight) if options.compute == "fp8" else u @ weight.T
    if scale_deviation is not None:
        y = (y * scale_of(scale_deviation)).to(x.dtype)
    if lora_a is not None and lora_b is not None:
        kept = x if mask is None else x * mask / (1 - options.lora_dropout)
        low_rank = (kept @ lora_a.T.to(x.dtype)) @ lora_b.T.to(x.dtype)
        y = y + options.lora_scaling * low_rank
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y


def scale_of(scale_deviation: Tensor) -> Tensor:
    """Return s, [N], from s − 1: in fp32, where that is wide enough for it."""
    return 1 + scale_deviation.to(torch.promote_types(scale_deviation.dtype, torch.float32))


def scale_deviation_of(scale: Tensor) -> Tensor:
    """Return s − 1, [N], from s: in fp32, where that is wide enough for it. Differentiable."""
    return scale.to(torch.promote_types(scale.dtype, torch.float32)) - 1


def effective_weight(
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scaling: float,
    diagonal: str,
) -> Tensor:
    """``W' = s ⊙ (W D_b) + α B A``, [N, K], rounded once to the dtype of ``weight``.

    Differentiable towards the adapter. Arguments as in
    :class:`~prodial_kernels.kernels.projector.operands.Operands`.
    """
    scale = None if scale_deviation is None else scale_of(scale_deviation)
    masters = [part for part in (blocks, scale, lora_a, lora_b) if part is not None]
    if not masters:
        return weight
    wide = weight.dtype
    for part in masters:
        wide = torch.promote_types(wide, part.dtype)
    adapted = weight.to(wide)
    if blocks is not None:
        adapted = rotate_weight(adapted, deviation(blocks, diagonal))
    if scale is not None:
        adapted = scale[:, None] * adapted
    if lora_a is not None and lora_b is not None:
        adapted = adapted + lora_scaling * (lora_b.to(wide) @ lora_a.to(wide))
    return adapted.to(weight.dtype)
