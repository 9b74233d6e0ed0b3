"""A projector on a packed weight: dequantised for each product, never kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels._validation import check_operands, check_triton
from prodial_kernels.functional import lay_out, prodial_linear, resolve_impl
from prodial_kernels.ops.autocast import autocast_dtype, autocast_off
from prodial_kernels.ops.explicit import Needs, Operands, Rule, project, project_backward

Unpack = Callable[[tuple[Tensor, ...], torch.dtype], Tensor]
"""(packed tensors, dtype) -> a new dense weight [out_features, in_features]."""


class PackedLinear(Protocol):
    """What of a quantised layer the operation needs."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""

    def packed(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored in."""

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Dequantise ``packed``, by nothing but it and the layer's constants."""


def quantized_linear(
    x: Tensor,
    layer: PackedLinear,
    *,
    bias: Tensor | None,
    channel_first: bool = False,
) -> Tensor:
    """``x Wᵀ + bias`` on a packed W; the only gradients are towards ``x`` and ``bias``.

    Args:
        x: [..., in_features].
        layer: Holds the packed weight.
        bias: [out_features].
        channel_first: Return contiguous [..., out_features, l].

    Raises:
        TypeError: A dtype that cannot be used.
        ValueError: A shape or device that does not fit.
    """
    dtype = autocast_dtype(x)
    check_operands(
        x, _stand_in(layer), None, None, None, None, bias, autocast=dtype is not None
    )  # fmt: skip
    if dtype is not None:
        x = x.to(dtype)
    bias = None if bias is None else bias.to(x.dtype)
    with autocast_off(x.device.type):
        y = QuantizedProdialLinear.apply(
            x, Rule("plain"), layer.unpack, None, None, None, None, bias, None, *layer.packed()
        )
        return lay_out(y, channel_first)


def quantized_prodial_linear(
    x: Tensor,
    layer: PackedLinear,
    *,
    blocks: Tensor | None,
    scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None = None,
    lora_scaling: float = 1.0,
    lora_dropout: float = 0.0,
    training: bool = False,
    diagonal: str = "relu",
    impl: str = "auto",
    channel_first: bool = False,
) -> Tensor:
    """:func:`prodial_kernels.prodial_linear` on the dequantised weight of ``layer``.

    Arguments, result and errors are the same. ``impl="reference"`` is plain autograd on one dense
    weight, which it keeps until backward; the others keep the packed tensors only.
    """
    parts: tuple[Tensor | None, ...] = (blocks, scale, lora_a, lora_b)
    dtype = autocast_dtype(x)
    check_operands(
        x, _stand_in(layer), blocks, scale, lora_a, lora_b, bias, autocast=dtype is not None
    )
    x = x if dtype is None else x.to(dtype)
    chosen = resolve_impl(impl, x)
    if chosen == "reference":
        return prodial_linear(
            x, layer.unpack(layer.packed(), x.dtype), blocks=blocks, scale=scale, lora_a=lora_a,
            lora_b=lora_b, bias=bias, lora_scaling=lora_scaling, lora_dropout=lora_dropout,
            training=training, diagonal=diagonal, impl=impl, channel_first=channel_first,
        )  # fmt: skip
    bias = None if bias is None else bias.to(x.dtype)
    noise = None
    dropped = training and lora_dropout > 0.0 and lora_a is not None
    if chosen == "triton":
        check_triton(x)
        # The kernels take no strides for these.
        parts = tuple(None if part is None else part.contiguous() for part in parts)
        bias = None if bias is None else bias.contiguous()
        if dropped:
            # On the device, so that checkpointing and CUDA graphs replay it.
            noise = torch.randint(2**31 - 1, (1,), device=x.device, dtype=torch.int64)
    elif dropped:
        noise = torch.rand(x.shape, device=x.device) >= lora_dropout
    rule = Rule(chosen, float(lora_scaling), float(lora_dropout), diagonal)
    with autocast_off(x.device.type):
        y = QuantizedProdialLinear.apply(
            x, rule, layer.unpack, *parts, bias, noise, *layer.packed()
        )
        return lay_out(y, channel_first)


class QuantizedProdialLinear(torch.autograd.Function):
    """Keeps X, H, the adapter and aliases of the packed weight; with ``"triton"`` Y where s trains.

    What is not asked for is not kept: a layer without an adapter keeps the packed weight alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rule: Rule,
        unpack: Unpack,
        blocks: Tensor | None,
        scale: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        noise: Tensor | None,
        *packed: Tensor,
    ) -> Tensor:
        """X [..., K] -> Y [..., N]; ``noise`` as in :class:`Operands`."""
        operands = Operands(unpack(packed, x.dtype), blocks, scale, lora_a, lora_b, bias, noise)
        y, h = project(_tokens(x), operands, rule)
        # view() would make the output a view, and autograd lets nobody change that in place.
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        needs = Needs(ctx.needs_input_grad[0], False, *ctx.needs_input_grad[3:8])
        if rule.impl != "triton" and not needs.bias:
            bias = None  # only the kernels' gradient of s asks for it
        ctx.save_for_backward(
            x if needs.input else None,
            y if needs.scale and rule.impl == "triton" else None,
            h if needs.scale or needs.lora_b else None,
            blocks, scale, lora_a, lora_b, bias, noise, *packed,
        )  # fmt: skip
        ctx.constants = (rule, unpack, needs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients towards x, blocks, scale, lora_a, lora_b and bias; only those asked for."""
        rule, unpack, needs = ctx.constants
        x, y, h, blocks, scale, lora_a, lora_b, bias, noise, *packed = ctx.saved_tensors
        with autocast_off(grad_output.device.type):
            weight = unpack(tuple(packed), grad_output.dtype)
            gradients = project_backward(
                _tokens(grad_output),
                None if x is None else _tokens(x),
                None if y is None else _tokens(y),
                h,
                Operands(weight, blocks, scale, lora_a, lora_b, bias, noise),
                rule,
                needs,
            )
        dx = gradients.x
        if dx is not None:
            dx = dx.reshape(*grad_output.shape[:-1], weight.shape[1])
        return dx, None, None, *gradients[2:], None, *(None for _ in packed)


def _tokens(x: Tensor) -> Tensor:
    """[..., features] -> [b, l, features]; three dimensions keep their strides."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _stand_in(layer: PackedLinear) -> Tensor:
    """A tensor with the shape, dtype and device of the dense weight, and one element."""
    one = torch.empty(1, dtype=layer.dtype, device=layer.device)
    return one.expand(layer.out_features, layer.in_features)
