"""Layers that transformers loaded with bitsandbytes, read from their stored tensors, exactly."""

from __future__ import annotations

import torch
from torch import nn

from prodial_kernels.quantization.convert import from_state_dict
from prodial_kernels.quantization.layer import QuantizedLinear

_4BIT, _8BIT = "Linear4bit", "Linear8bitLt"


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether ``module`` is a quantised linear layer of bitsandbytes, which is not imported."""
    return any(
        cls.__name__ in (_4BIT, _8BIT) and cls.__module__.startswith("bitsandbytes.")
        for cls in type(module).__mro__
    )


def from_bitsandbytes(module: nn.Module, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """Return the layer with the same stored weight, shared and not copied; ``module`` stays.

    Args:
        module: A ``Linear4bit`` in NF4 that holds its weight.
        dtype: Not asked for: bitsandbytes says it.

    Returns:
        The same weight bit for bit. Its dtype is the narrower of the two that bitsandbytes has,
        for what it computes in and for what it dequantises to.

    Raises:
        ValueError: Another format, or a weight that is not there or no longer what was loaded.
    """
    kinds = {cls.__name__ for cls in type(module).__mro__}
    if _8BIT in kinds:
        raise ValueError(
            "a Linear8bitLt quantises its inputs too (LLM.int8), which an adapted layer would not "
            'do; load the model with load_in_4bit=True and bnb_4bit_quant_type="nf4", or load it '
            'in 16 bits and call prodial_kernels.quantize_model(model, "int8"), which stores the '
            "same 8 bits"
        )
    quant_state = getattr(module.weight, "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "a Linear4bit that was evaluated on this CPU, where bitsandbytes repacks it in place "
            "and rounds its scales; load the model again and adapt it before it is evaluated"
        )
    state = module.state_dict()
    stored = state.get("weight")
    if stored is None or stored.is_meta:
        raise ValueError("a Linear4bit without a weight; load its weight first")
    kind = getattr(quant_state, "quant_type", None)
    if kind is None:
        raise ValueError(
            "a Linear4bit whose weight is not quantised yet; move the model to its device first"
        )
    if kind != "nf4":
        raise ValueError(
            f"a Linear4bit in {kind}, of which 4-bit formats only NF4 is read; load the model with "
            'bnb_4bit_quant_type="nf4"'
        )
    layer = from_state_dict(state)
    computed = getattr(module, "compute_dtype", None)
    if computed is not None and computed.itemsize < layer.dtype.itemsize:
        layer = layer.to(computed)
    shapes = [[each.out_features, each.in_features] for each in (module, layer)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"a Linear4bit of shape [out_features, in_features] = {shapes[0]} whose stored weight "
            f"has {shapes[1]}"
        )
    return layer.train(module.training)
