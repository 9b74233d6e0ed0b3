"""The autograd rule of ``impl="triton"``: what is kept, and which operator makes the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.ops.layout import unit_stride_rows
from prodial_kernels.ops.schema import linear_backward, linear_forward


class TritonProdialLinear(torch.autograd.Function):
    """Keeps X, the adapter, H and, where the scale trains, Y. Derivation: ``ops/README.md``."""

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
        seed: Tensor | None,
        lora_scaling: float,
        lora_dropout: float,
        diagonal: str,
        length: int,
    ) -> Tensor:
        """X -> Y, in the layouts of the operator; ``seed`` [1] int64 switches dropout on."""
        relu = diagonal == "relu"
        y, h = linear_forward(
            x, weight, blocks, scale, lora_a, lora_b, bias, seed, lora_scaling, lora_dropout, relu,
            length,
        )  # fmt: skip
        kept_y = y if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(
            x, weight, blocks, scale, lora_a, lora_b, bias, seed, kept_y,
            None if lora_a is None else h,
        )  # fmt: skip
        ctx.options = (lora_scaling, lora_dropout, relu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients towards x, blocks, scale, lora_a, lora_b and bias; only those asked for."""
        need_x, _, *need_adapter = ctx.needs_input_grad[:7]
        dy = unit_stride_rows(grad_output)
        gradients = linear_backward(dy, *ctx.saved_tensors, *ctx.options, need_x, *need_adapter)
        dx, *adapter = (
            gradient if needed else None
            for gradient, needed in zip(gradients, (need_x, *need_adapter), strict=True)
        )
        return dx, None, *adapter, None, None, None, None, None
