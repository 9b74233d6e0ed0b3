"""A projector as an autograd.Function on plain forward and backward functions."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.projection import (
    Needs,
    Operands,
    Rule,
    project,
    project_backward,
    takes_output,
)


class Remade(Protocol):
    """What of a projector's backward somebody else makes."""

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Return X [..., K] once more, and ``project_backward``'s ``scaled``."""


def explicit_linear(
    x: Tensor, operands: Operands, rule: Rule, remade: Remade | None = None
) -> Tensor:
    """``x W'ᵀ + bias``, where the weight may be packed and the input made again.

    Args:
        x: [..., in_features].
        operands: In the dtype that is computed in.
        rule: What of the projector is not a tensor.
        remade: Makes ``x`` once more in backward, so that it is not kept.

    Returns:
        [..., out_features].
    """
    with autocast_off(x.device.type):
        y: Tensor = ExplicitProdialLinear.apply(
            x.to(operands.weight.dtype), remade, rule, *operands
        )
    return y


class ExplicitProdialLinear(torch.autograd.Function):
    """Keeps X, H and aliases of the adapter; with ``"triton"`` Y where s trains.

    What is not asked for is not kept: a layer without an adapter keeps its packed weight alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        remade: Remade | None,
        rule: Rule,
        *tensors: Tensor | None,
    ) -> Tensor:
        """X [..., K] -> Y [..., N]; ``tensors`` are the fields of ``Operands``."""
        operands = Operands(*tensors)  # type: ignore[arg-type]
        y, h = project(_tokens(x), operands, rule)
        # view() would make the output a view, and autograd lets nobody change that in place.
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[3:9])
        if rule.impl != "triton" and not needs.bias:
            operands = operands._replace(bias=None)  # only the kernels' gradient of s asks for it
        ctx.save_for_backward(
            x if needs.input and remade is None else None,
            y if needs.scale and takes_output(operands, rule) else None,
            h if needs.scale or needs.lora_b else None,
            *operands,
        )
        ctx.remade, ctx.rule, ctx.needs = remade, rule, needs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        x, y, h, *tensors = ctx.saved_tensors
        operands = Operands(*tensors)
        with autocast_off(grad_output.device.type):
            scaled = None
            if ctx.needs.input and ctx.remade is not None:
                x, scaled = ctx.remade.take()
            dx, *rest = project_backward(
                _tokens(grad_output),
                None if x is None else _tokens(x),
                None if y is None else _tokens(y),
                h, operands, ctx.rule, ctx.needs, scaled=scaled,
            )  # fmt: skip
        if dx is not None:
            dx = dx.reshape(*grad_output.shape[:-1], operands.weight.shape[1])
        return dx, None, None, *rest, None


def _tokens(x: Tensor) -> Tensor:
    """[..., features] -> [b, l, features]; three dimensions keep their strides."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
