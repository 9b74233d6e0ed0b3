"""A projector on a frozen weight, dense or packed: what it computes with, and the call itself.

A packed weight is dequantised for each product and never kept for backward.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from prodial_kernels._checks import check_finite
from prodial_kernels._validation import check_frozen, check_operands, check_triton
from prodial_kernels.functional import adapted_linear, contiguous, draw_seed, lay_out
from prodial_kernels.ops.autocast import autocast_dtype
from prodial_kernels.ops.function import explicit_linear
from prodial_kernels.ops.implementation import resolve_impl
from prodial_kernels.ops.layout import unit_stride_rows
from prodial_kernels.ops.packed import PackedWeight
from prodial_kernels.ops.projection import Operands, Rule


class PackedLinear(Protocol):
    """What of a quantised layer the operation needs."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""

    def packed_weight(self) -> PackedWeight:
        """The weight as it is stored."""


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
    operands, rule = plain_operands(x, layer, bias)
    return lay_out(explicit_linear(x, operands, rule), channel_first)


def quantized_prodial_linear(
    x: Tensor,
    layer: PackedLinear,
    *,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
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
    """:func:`prodial_kernels.functional.adapted_linear` on the dequantised weight of ``layer``.

    Arguments, result and errors are the same. ``impl="reference"`` is plain autograd on one dense
    weight, which it keeps until backward; the others keep the packed tensors only.
    """
    options: dict[str, Any] = {
        "blocks": blocks, "scale_deviation": scale_deviation, "lora_a": lora_a, "lora_b": lora_b,
        "bias": bias, "lora_scaling": lora_scaling, "lora_dropout": lora_dropout,
        "training": training, "diagonal": diagonal, "impl": impl,
    }  # fmt: skip
    if impl == "reference":
        cast = autocast_dtype(x)
        check_operands(
            x,
            _stand_in(layer),
            blocks,
            scale_deviation,
            lora_a,
            lora_b,
            bias,
            autocast=cast is not None,
        )
        dtype = cast or x.dtype
        weight = layer.packed_weight().dense(dtype)
        return adapted_linear(x.to(dtype), weight, channel_first=channel_first, **options)
    return lay_out(explicit_linear(x, *adapted_operands(x, layer, **options)), channel_first)


def plain_operands(x: Tensor, layer: PackedLinear, bias: Tensor | None) -> tuple[Operands, Rule]:
    """Return what ``x Wᵀ + bias`` on a packed W computes with.

    Args:
        x: [..., in_features]; shape, dtype and device count.
        layer: Holds the packed weight.
        bias: [out_features].

    Raises:
        TypeError: A dtype that cannot be used.
        ValueError: A shape or device that does not fit.
    """
    cast = autocast_dtype(x)
    dtype = cast or x.dtype
    check_operands(
        x, _stand_in(layer), None, None, None, None, bias, autocast=cast is not None
    )  # fmt: skip
    bias = None if bias is None else bias.to(dtype)
    return Operands(_values_elsewhere(layer, dtype), bias=bias), Rule(
        "plain", packed=layer.packed_weight()
    )


def adapted_operands(
    x: Tensor,
    base: Tensor | PackedLinear,
    *,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    training: bool,
    diagonal: str,
    impl: str,
) -> tuple[Operands, Rule]:
    """Return what ``adapted_linear`` computes with, in the dtypes of autocast; draw its dropout.

    Args:
        x: [..., in_features]; shape, dtype and device count.
        base: The frozen weight [out_features, in_features], or the layer that packs it.
        blocks: As in :func:`prodial_kernels.functional.adapted_linear`, and so is what follows.
        scale_deviation: s − 1.
        lora_a: A.
        lora_b: B.
        bias: [out_features].
        lora_scaling: α.
        lora_dropout: Dropout probability.
        training: Whether dropout is active.
        diagonal: ``"relu"`` or ``"free"``.
        impl: Not ``"reference"``.

    Raises:
        RuntimeError: The kernels cannot run on this device.
        TypeError: A dtype that cannot be used.
        ValueError: A shape or device that does not fit, a weight that requires a gradient, or
            ``impl="reference"``, whose backward is autograd's.
    """
    if not torch.compiler.is_compiling():
        check_finite("lora_scaling", lora_scaling)
    cast = autocast_dtype(x)
    dtype = cast or x.dtype
    like = base if isinstance(base, Tensor) else _stand_in(base)
    check_operands(
        x, like, blocks, scale_deviation, lora_a, lora_b, bias, autocast=cast is not None
    )  # fmt: skip
    x = x if x.dtype == dtype else x.new_empty(1, dtype=dtype).expand(x.shape)
    chosen = resolve_impl(impl, x)
    if chosen == "reference":
        raise ValueError("a projector with impl='reference' has no explicit backward; call it")
    packed = noise = None
    if isinstance(base, Tensor):
        check_frozen(base)
        weight = base.to(dtype)
    else:
        weight, packed = _values_elsewhere(base, dtype), base.packed_weight()
    bias = None if bias is None else bias.to(dtype)
    operands = Operands(weight, blocks, scale_deviation, lora_a, lora_b, bias)
    dropped = training and lora_dropout > 0.0 and lora_a is not None
    if chosen == "triton":
        check_triton(x)
        # The kernels take one stride of a matrix and none of the others.
        operands = Operands(unit_stride_rows(weight), *(map(contiguous, operands[1:])))
        noise = draw_seed(x) if dropped else None
    elif dropped:
        noise = torch.rand(x.shape, device=x.device) >= lora_dropout
    rule = Rule(chosen, float(lora_scaling), float(lora_dropout), diagonal, packed)
    return operands._replace(noise=noise), rule


def _values_elsewhere(layer: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The shape and dtype of the dense weight; using its values is an error."""
    return torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")


def _stand_in(layer: PackedLinear) -> Tensor:
    """A tensor with the shape, dtype and device of the dense weight, and one element."""
    one = torch.empty(1, dtype=layer.dtype, device=layer.device)
    return one.expand(layer.out_features, layer.in_features)
