"""The autograd rule of ``impl="triton"``: what is kept, and which operator makes the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.ops.layout import token_matrix, unit_stride_rows
from prodial_kernels.ops.operators import linear_backward, linear_forward
from prodial_kernels.ops.wide_rank import is_wide


class TritonProdialLinear(torch.autograd.Function):
    """Keeps X, the adapter, H and, where the scale trains, Y. Derivation: ``ops/README.md``.

    Reshaping to the matrices that the kernels take happens in here, where autograd makes no node
    of it.
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
        seed: Tensor | None,
        lora_scaling: float,
        lora_dropout: float,
        relu: bool,
        length: int,
    ) -> Tensor:
        """X [..., l, K] -> Y [..., l, N], or channel-first [..., N, l] where ``length`` is l.

        ``seed`` [1] int64 switches dropout on.
        """
        matrix = token_matrix(x)
        y, h = linear_forward(
            matrix, weight, blocks, scale_deviation, lora_a, lora_b, bias, seed, lora_scaling,
            lora_dropout, relu, length,
        )  # fmt: skip
        n = weight.shape[0]
        shape = (*x.shape[:-2], n, length) if length else (*x.shape[:-1], n)
        if y.ndim != len(shape):
            # A view made in here could not be changed in place by whoever receives it.
            y = torch.ops.aten._unsafe_view(y, shape)
        wide = is_wide(lora_a, seed)  # needs neither Y nor H
        ctx.save_for_backward(
            matrix, weight, blocks, scale_deviation, lora_a, lora_b, bias, seed,
            y if ctx.needs_input_grad[3] and not wide else None,
            None if lora_a is None or wide else h,
        )  # fmt: skip
        ctx.options = (lora_scaling, lora_dropout, relu)
        ctx.shape, ctx.length = x.shape, length
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients towards x, blocks, s, lora_a, lora_b and bias; only those asked for."""
        # Gradients are recorded here for create_graph=True alone, which is what the other refuses;
        # asking costs less than its no_grad().
        rule = _refusing_twice if torch.is_grad_enabled() else _backward
        return rule(ctx, grad_output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, *operands, y, h = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dy = _matrix(grad_output, ctx.length)
    dx, *adapter = linear_backward(
        dy, x, *operands, None if y is None else _matrix(y, ctx.length), h, None, *ctx.options,
        needs[0], *needs[2:7],
    )  # fmt: skip
    if dx is None or not needs[0]:
        dx = None
    elif x.ndim == 3:
        dx = dx.mT
    elif len(ctx.shape) != 2:
        dx = dx.view(ctx.shape)
    return (
        dx, None,
        *[part if need else None for part, need in zip(adapter, needs[2:7], strict=True)],
        None, None, None, None, None,
    )  # fmt: skip


_refusing_twice = once_differentiable(_backward)


def _matrix(y: Tensor, length: int) -> Tensor:
    """Y or dY, [..., l, N] -> [M, N], or channel-first [..., N, l] -> [b, N, l]."""
    if length:
        return unit_stride_rows(y if y.ndim == 3 else y.reshape(-1, *y.shape[-2:]))
    return unit_stride_rows(y if y.ndim == 2 else y.reshape(-1, y.shape[-1]))
