"""``HQQLinear`` of hqq, which stores codes with a scale and a zero point in floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prodial_kernels.quantization.groups.layouts import from_hqq
from prodial_kernels.quantization.layer import QuantizedLinear


def is_hqq(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of hqq's, whatever computes its product."""
    return any(cls.__module__.startswith("hqq.") for cls in type(module).__mro__)


def from_hqq_linear(module: nn.Module, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """Return the layer with the same weight, repacked; ``dtype`` defaults to hqq's own.

    Raises:
        ValueError: A layer that was prepared for a kernel, or quantised scales.
    """
    layer: Any = module
    if type(module).__name__ != "HQQLinear":
        raise ValueError(
            f"a {type(module).__name__} has repacked its weight for its kernel; adapt the model "
            "before prepare_for_inference"
        )
    if not layer.ready or layer.W_q is None or layer.W_q.is_meta:
        raise ValueError("an HQQLinear without a weight; quantise it, or load its weight first")
    bias = None if layer.bias is None else layer.bias.detach()
    return from_hqq(layer.W_q.detach(), layer.meta, bias=bias, dtype=dtype or layer.compute_dtype)
