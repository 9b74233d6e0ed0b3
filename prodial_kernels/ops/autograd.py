"""The hand-written backward in PyTorch: runs on any device, never forms W'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.diagonal import (
    block_outer_product,
    deviation,
    deviation_backward,
    rotate,
)


class TorchProdialLinear(torch.autograd.Function):
    """``impl="torch"``. Keeps X, H = dropout(X) Aᵀ, the dropout mask and the adapter for backward.

    U and U Wᵀ are recomputed where their gradients are asked for, so nothing of size [M, N] is
    kept and a caller may overwrite the output in place, as after ``nn.Linear``.
    Derivation: ``ops/README.md``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        blocks: Tensor | None,
        scale: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        dropout_mask: Tensor | None,
        lora_scaling: float,
        lora_dropout: float,
        diagonal: str,
    ) -> Tensor:
        """Arguments and result as in :func:`prodial_kernels.ops.reference.reference_linear`."""
        rows = x.reshape(-1, x.shape[-1])
        u = rows if blocks is None else rotate(rows, deviation(blocks, diagonal))
        y = u @ weight.T
        if scale is not None:
            y.mul_(scale)
        h = None
        if lora_a is not None and lora_b is not None:
            kept = _kept_input(rows, dropout_mask, lora_dropout)
            h = kept @ lora_a.T.to(x.dtype)
            y.addmm_(h, lora_b.T.to(x.dtype), alpha=lora_scaling)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, weight, blocks, scale, lora_a, lora_b, h, dropout_mask)
        ctx.lora_scaling = lora_scaling
        ctx.lora_dropout = lora_dropout
        ctx.diagonal = diagonal
        ctx.bias_dtype = None if bias is None else bias.dtype
        # reshape() would make the output a view, and autograd lets nobody change that in place.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients towards x, blocks, scale, lora_a, lora_b and bias; only those asked for."""
        x, weight, blocks, scale, lora_a, lora_b, h, dropout_mask = ctx.saved_tensors
        need_x, _, need_blocks, need_scale, need_a, need_b, need_bias = ctx.needs_input_grad[:7]
        alpha = ctx.lora_scaling
        with autocast_off(x.device.type):
            dy = grad_output.reshape(-1, weight.shape[0])
            rows = x.reshape(-1, x.shape[-1])
            e = None if blocks is None else deviation(blocks, ctx.diagonal)

            dx = dblocks = dscale = da = db = dbias = None
            if need_scale:
                u = rows if e is None else rotate(rows, e)
                dscale = ((u @ weight.T) * dy.to(scale.dtype)).sum(0)
            if need_x or need_blocks:
                g = dy if scale is None else (dy * scale).to(dy.dtype)
                du = g @ weight
                if need_blocks:
                    block_size = blocks.shape[-1]
                    de = block_outer_product(du, rows, block_size).to(blocks.dtype)
                    dblocks = deviation_backward(de, blocks, ctx.diagonal)
                if need_x:
                    dx = du if e is None else rotate(du, e, transpose=True)
            if lora_a is not None and lora_b is not None:
                if need_b:
                    db = (alpha * (dy.T @ h)).to(lora_b.dtype)
                if need_a or need_x:
                    t = alpha * (dy @ lora_b.to(dy.dtype))
                if need_a:
                    kept = _kept_input(rows, dropout_mask, ctx.lora_dropout)
                    da = (t.T @ kept).to(lora_a.dtype)
                if dx is not None:
                    low_rank = t @ lora_a.to(t.dtype)
                    dx = dx + _kept_input(low_rank, dropout_mask, ctx.lora_dropout)
            if need_bias:
                dbias = dy.sum(0).to(ctx.bias_dtype)
            if dx is not None:
                dx = dx.reshape(x.shape)
        return dx, None, dblocks, dscale, da, db, dbias, None, None, None, None


def _kept_input(rows: Tensor, dropout_mask: Tensor | None, lora_dropout: float) -> Tensor:
    """Inverted dropout with a given mask: [M, K] -> [M, K]."""
    if dropout_mask is None:
        return rows
    return rows * dropout_mask.reshape(rows.shape) / (1 - lora_dropout)
