"""The hand-written backward in PyTorch: runs on any device, never forms W'."""

from __future__ import annotations

import torch
from torch import Tensor

from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.ops.diagonal import (
    block_outer_product,
    deviation,
    deviation_backward,
    rotate,
)
from prodial_kernels.ops.fp8.rounding import rounded
from prodial_kernels.ops.products import wide_product
from prodial_kernels.ops.reference import scale_of


def torch_forward(
    x: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Tensor | None]:
    """X [..., K] -> Y [M, N] and H = dropout(X) Aᵀ [M, R], None without LoRA."""
    weight, blocks, scale_deviation, lora_a, lora_b, bias, mask = operands
    rows = _matrix(x)
    u = rows if blocks is None else rotate(rows, deviation(blocks, options.diagonal))
    y = (rounded(u) if options.compute == "fp8" else u) @ weight.T
    if scale_deviation is not None:
        y.mul_(scale_of(scale_deviation))
    h = None
    if lora_a is not None and lora_b is not None:
        kept = _kept_input(rows, mask, options.lora_dropout)
        h = kept @ lora_a.T.to(x.dtype)
        y.addmm_(h, lora_b.T.to(x.dtype), alpha=options.lora_scaling)
    if bias is not None:
        y.add_(bias)
    return y, h


def torch_backward(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    h: Tensor | None,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """The gradients that are asked for, from dY [..., N], X [..., K] and H, for the one of B.

    U and U Wᵀ are recomputed where their gradients are asked for, so nothing of size [M, N] is
    kept and a caller may overwrite the output in place, as after ``nn.Linear``. Without a bias
    among the operands, its gradient is in fp32. Derivation: ``ops/README.md``.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, bias, mask = operands
    alpha, dropout, diagonal = options.lora_scaling, options.lora_dropout, options.diagonal
    shape, fp8 = x.shape, options.compute == "fp8"
    dy, rows = _matrix(dy), _matrix(x)
    e = None if blocks is None else deviation(blocks, diagonal)
    dx = dblocks = dscale = da = db = dbias = None
    if needs.scale and scale_deviation is not None:
        u = rows if e is None else rotate(rows, e)
        u = rounded(u) if fp8 else u
        wide = torch.promote_types(scale_deviation.dtype, torch.float32)
        dscale = ((u @ weight.T) * dy.to(wide)).sum(0).to(scale_deviation.dtype)
    if needs.x or needs.blocks:
        g = dy
        if scale_deviation is not None:
            g = (dy * scale_of(scale_deviation)).to(dy.dtype)
        du = (rounded(g) if fp8 else g) @ weight
        if needs.blocks and blocks is not None:
            de = block_outer_product(du, rows, blocks.shape[-1]).to(blocks.dtype)
            dblocks = deviation_backward(de, blocks, diagonal)
        if needs.x:
            dx = du if e is None else rotate(du, e, transpose=True)
    if lora_a is not None and lora_b is not None:
        if needs.lora_b and h is not None:
            db = (alpha * wide_product(dy.T, h)).to(lora_b.dtype)
        if needs.lora_a or needs.x:
            t = alpha * (dy @ lora_b.to(dy.dtype))
        if needs.lora_a:
            kept = _kept_input(rows, mask, dropout)
            da = wide_product(t.T, kept).to(lora_a.dtype)
        if dx is not None:
            low_rank = t @ lora_a.to(t.dtype)
            dx = dx + _kept_input(low_rank, mask, dropout)
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        dbias = dbias if bias is None else dbias.to(bias.dtype)
    if dx is not None:
        dx = dx.reshape(shape)
    return Gradients(dx, None, dblocks, dscale, da, db, dbias)


def _matrix(x: Tensor) -> Tensor:
    """[..., F] -> [M, F], also where F is 0, which ``reshape(-1, F)`` does not take."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _kept_input(rows: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Inverted dropout with a given mask: [M, K] -> [M, K]."""
    if mask is None:
        return rows
    return rows * mask.reshape(rows.shape) / (1 - dropout)
