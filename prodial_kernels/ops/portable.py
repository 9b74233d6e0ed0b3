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
from prodial_kernels.ops.products import wide_product
from prodial_kernels.ops.reference import scale_of


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
        scale_deviation: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        dropout_mask: Tensor | None,
        lora_scaling: float,
        lora_dropout: float,
        diagonal: str,
    ) -> Tensor:
        """Arguments and result as in :func:`prodial_kernels.ops.reference.reference_linear`."""
        options = (lora_scaling, lora_dropout, diagonal)
        y, h = torch_forward(
            x, weight, blocks, scale_deviation, lora_a, lora_b, bias, dropout_mask, *options
        )  # fmt: skip
        ctx.save_for_backward(x, weight, blocks, scale_deviation, lora_a, lora_b, h, dropout_mask)
        ctx.options = (*options, None if bias is None else bias.dtype)
        # reshape() would make the output a view, and autograd lets nobody change that in place.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients towards x, blocks, s, lora_a, lora_b and bias; only those asked for."""
        need_x, _, *need_adapter = ctx.needs_input_grad[:7]
        needs = (need_x, *need_adapter)
        dx, *adapter = torch_backward(needs, grad_output, *ctx.saved_tensors, *ctx.options)
        return dx, None, *adapter, None, None, None, None


def torch_forward(
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    dropout_mask: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    diagonal: str,
) -> tuple[Tensor, Tensor | None]:
    """X [..., K] -> Y [M, N] and H [M, R], None without LoRA."""
    rows = _matrix(x)
    u = rows if blocks is None else rotate(rows, deviation(blocks, diagonal))
    y = u @ weight.T
    if scale_deviation is not None:
        y.mul_(scale_of(scale_deviation))
    h = None
    if lora_a is not None and lora_b is not None:
        kept = _kept_input(rows, dropout_mask, lora_dropout)
        h = kept @ lora_a.T.to(x.dtype)
        y.addmm_(h, lora_b.T.to(x.dtype), alpha=lora_scaling)
    if bias is not None:
        y.add_(bias)
    return y, h


def torch_backward(
    needs: tuple[bool, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    h: Tensor | None,
    dropout_mask: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    diagonal: str,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Gradients towards x, blocks, s, lora_a, lora_b and bias, as ``needs`` says."""
    need_x, need_blocks, need_scale, need_a, need_b, need_bias = needs
    with autocast_off(x.device.type):
        dy, rows = _matrix(dy), _matrix(x)
        e = None if blocks is None else deviation(blocks, diagonal)

        dx = dblocks = dscale = da = db = dbias = None
        if need_scale and scale_deviation is not None:
            u = rows if e is None else rotate(rows, e)
            wide = torch.promote_types(scale_deviation.dtype, torch.float32)
            dscale = ((u @ weight.T) * dy.to(wide)).sum(0).to(scale_deviation.dtype)
        if need_x or need_blocks:
            g = dy
            if scale_deviation is not None:
                g = (dy * scale_of(scale_deviation)).to(dy.dtype)
            du = g @ weight
            if need_blocks and blocks is not None:
                de = block_outer_product(du, rows, blocks.shape[-1]).to(blocks.dtype)
                dblocks = deviation_backward(de, blocks, diagonal)
            if need_x:
                dx = du if e is None else rotate(du, e, transpose=True)
        if lora_a is not None and lora_b is not None:
            if need_b and h is not None:
                db = (lora_scaling * wide_product(dy.T, h)).to(lora_b.dtype)
            if need_a or need_x:
                t = lora_scaling * (dy @ lora_b.to(dy.dtype))
            if need_a:
                kept = _kept_input(rows, dropout_mask, lora_dropout)
                da = wide_product(t.T, kept).to(lora_a.dtype)
            if dx is not None:
                low_rank = t @ lora_a.to(t.dtype)
                dx = dx + _kept_input(low_rank, dropout_mask, lora_dropout)
        if need_bias:
            wide = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy.sum(0, dtype=wide).to(bias_dtype)
        if dx is not None:
            dx = dx.reshape(x.shape)
    return dx, dblocks, dscale, da, db, dbias


def _matrix(x: Tensor) -> Tensor:
    """[..., F] -> [M, F], also where F is 0, which ``reshape(-1, F)`` does not take."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _kept_input(rows: Tensor, dropout_mask: Tensor | None, lora_dropout: float) -> Tensor:
    """Inverted dropout with a given mask: [M, K] -> [M, K]."""
    if dropout_mask is None:
        return rows
    return rows * dropout_mask.reshape(rows.shape) / (1 - lora_dropout)
