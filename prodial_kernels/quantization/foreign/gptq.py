"""Layers of gptqmodel, as transformers loads GPTQ and AWQ checkpoints, and of AutoAWQ.

Both have a class for each kernel, and some kernels repack a weight when a model is loaded. Read are
the classes that keep the checkpoint's own layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prodial_kernels.quantization.groups.layouts import from_awq, from_gptq
from prodial_kernels.quantization.layer import QuantizedLinear

_GPTQ = ("TorchLinear", "TritonV2Linear")
_AWQ = ("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear", "WQLinear_GEMM")


def is_gptq_or_awq(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of gptqmodel or AutoAWQ."""
    return any(
        (cls.__name__ == "BaseQuantLinear" and cls.__module__.startswith("gptqmodel."))
        or cls.__module__.startswith("awq.modules.linear.")
        for cls in type(module).__mro__
    )


def from_gptq_or_awq(module: nn.Module, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """Return the layer with the same weight, repacked; ``dtype`` defaults to that of the scales.

    Raises:
        ValueError: A class with another layout, or an adapter of gptqmodel's.
    """
    layer: Any = module
    name = type(module).__name__
    if name not in (*_GPTQ, *_AWQ) or getattr(layer, "planar", False):
        raise ValueError(
            f"a {name} has repacked its weight for its kernel, or holds another format; load the "
            'model with GPTQConfig(bits=…, backend="gptq_torch") or AwqConfig(backend='
            '"torch_awq"), or let this package read the checkpoint (prodial, or load_model)'
        )
    if getattr(layer, "adapter", None) is not None:
        raise ValueError(f"a {name} with an adapter of its own (EoRA), which would be lost")
    entries = {
        entry: tensor.detach()
        for entry in ("qweight", "qzeros", "scales", "g_idx")
        if (tensor := getattr(layer, entry, None)) is not None
    }
    if any(tensor.is_meta for tensor in entries.values()):
        raise ValueError("its weight is on the meta device; load its weight first")
    bias = getattr(layer, "bias", None)
    if name in _AWQ:
        read = from_awq(entries, bias=bias, dtype=dtype)
    else:
        # gptqmodel converts what it loads to version 2 for the kernels that say so.
        version = 2 if type(layer).REQUIRES_FORMAT_V2 else 1
        read = from_gptq(entries, int(layer.bits), version=version, bias=bias, dtype=dtype)
    shapes = [[each.out_features, each.in_features] for each in (layer, read)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a {name} of shape {shapes[0]} whose stored weight has {shapes[1]}")
    return read
