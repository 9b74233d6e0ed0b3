"""A projector as an autograd.Function: what is kept for backward, whatever computes it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.kernels.projector.operands import Kept, Needs, Operands, ProjectionOptions
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.detours import is_small
from prodial_kernels.ops.layout import direct_length, lay_out, token_matrix, unit_stride_rows
from prodial_kernels.ops.projection import (
    backward,
    forward,
    takes_channel_first,
    takes_output,
)


class Recomputed(Protocol):
    """Gives a projector's backward the input that it did not keep."""

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Return the recomputed X [..., K], and s ⊙ W where it was prefetched."""


def differentiable_projection(
    x: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    *,
    channel_first: bool = False,
    recomputed: Recomputed | None = None,
) -> Tensor:
    """``x W'ᵀ + bias`` as one node of autograd's graph.

    Args:
        x: [..., in_features].
        operands: In the dtype that is computed in.
        options: Of any ``impl`` but ``"reference"``.
        channel_first: Return contiguous [..., out_features, l] instead of [..., out_features].
        recomputed: Recomputes ``x`` in backward, so that it is not kept.
    """
    length = 0
    if channel_first and takes_channel_first(options) and direct_length(x.shape[-2]):
        length = x.shape[-2]
    if x.dtype != operands.weight.dtype:
        with autocast_off(x.device.type):
            x = x.to(operands.weight.dtype)
    y: Tensor = ProdialLinearFunction.apply(x, *operands, recomputed, options, length)
    return y if length else lay_out(y, channel_first)


class ProdialLinearFunction(torch.autograd.Function):
    """Keeps what the asked gradients need of X, H and Y, and aliases of the adapter.

    Of X it keeps the matrix that the kernels take; Y only with ``"triton"``, where s trains and the
    output may therefore not be changed in place. A packed weight stays packed; the weight is not
    copied. Derivation: ``ops/README.md``. Reshaping happens in here, where autograd makes no node
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
        noise: Tensor | None,
        recomputed: Recomputed | None,
        options: ProjectionOptions,
        length: int,
    ) -> Tensor:
        """X [..., l, K] -> Y [..., l, N], or channel-first [..., N, l] where ``length`` is l.

        ``x`` and the fields of ``Operands`` are in the dtype that is computed in; ``length`` is not
        0 with ``"triton"`` only.
        """
        operands = Operands(weight, blocks, scale_deviation, lora_a, lora_b, bias, noise)
        needs = Needs(*ctx.needs_input_grad[:7])
        kernels = options.impl == "triton"
        direct = takes_channel_first(options)
        given, x = x.shape, token_matrix(x, direct=direct) if kernels else x
        y, h = forward(x, operands, options, length)
        small = direct and h is None and not length and is_small(x, operands)
        n = weight.shape[0]
        shape = (*given[:-2], n, length) if length else (*given[:-1], n)
        if y.ndim != len(shape) or options.impl == "plain":
            # A view made in here could not be changed in place by whoever receives it.
            y = torch.ops.aten._unsafe_view(y, shape)
        keeps_x = needs.input and recomputed is None
        ctx.save_for_backward(
            x if keeps_x else None,
            y if needs.scale and takes_output(operands, options) and not small else None,
            h if needs.lora_b or (kernels and needs.scale) else None,
            weight, blocks, scale_deviation, lora_a, lora_b,
            bias if kernels else None,  # which the gradient of s asks for
            noise,
        )  # fmt: skip
        ctx.recomputed, ctx.options, ctx.needs, ctx.length = recomputed, options, needs, length
        ctx.shape = None if keeps_x else x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        # Gradients are recorded here for create_graph=True alone, which is what the other refuses;
        # asking costs less than its no_grad().
        rule = _refusing_twice if torch.is_grad_enabled() else _backward
        return rule(ctx, grad_output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, y, h, *tensors = ctx.saved_tensors
    operands, options, needs, length = Operands(*tensors), ctx.options, ctx.needs, ctx.length
    kernels = options.impl == "triton"
    scaled = None
    if needs.input and ctx.recomputed is not None:
        with autocast_off(grad_output.device.type):
            x, scaled = ctx.recomputed.take()
        x = token_matrix(x, direct=takes_channel_first(options)) if kernels else x
    if x is None:  # its layout is enough, and without the kernels its shape
        blank = grad_output.new_empty
        x = blank(ctx.shape) if kernels else blank(()).expand(ctx.shape)
    dy = grad_output
    if kernels:
        dy, y = _matrix(dy, length), None if y is None else _matrix(y, length)
    dx, *adapter = backward(dy, x, operands, Kept(y, h, scaled), options, needs)
    if dx is not None:
        if kernels and dx.ndim == 3:
            dx = dx.mT
        elif dx.ndim != grad_output.ndim:
            tokens = (*grad_output.shape[:-2], length) if length else grad_output.shape[:-1]
            dx = dx.view(*tokens, operands.weight.shape[1])
    return dx, *adapter, None, None, None, None


_refusing_twice = once_differentiable(_backward)


def _matrix(y: Tensor, length: int) -> Tensor:
    """Y or dY, [..., l, N] -> [M, N], or channel-first [..., N, l] -> [b, N, l]."""
    if length:
        return unit_stride_rows(y if y.ndim == 3 else y.reshape(-1, *y.shape[-2:]))
    return unit_stride_rows(y if y.ndim == 2 else y.reshape(-1, y.shape[-1]))
