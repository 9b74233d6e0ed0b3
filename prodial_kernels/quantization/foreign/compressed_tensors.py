"""Linear layers of a model that compressed-tensors compressed: integers by groups or rows, and FP8.

transformers leaves the class ``nn.Linear``, takes the weight away and puts what it is stored in
beside. At the model's first call compressed-tensors makes dense weights of all that are left, so a
model is adapted before that; layers that are not adapted become dense then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.quantization.groups.layouts import from_compressed_tensors
from prodial_kernels.quantization.int8 import Int8Linear
from prodial_kernels.quantization.layer import QuantizedLinear

_OF_TRANSFORMERS = "CompressedTensorsFP8Linear"
_WAY_OUT = "load the dense checkpoint, and quantise it with prodial_kernels.quantize_model"


def is_compressed_tensors(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that compressed-tensors has to do with."""
    if not isinstance(module, nn.Linear):
        return False
    scheme = getattr(module, "quantization_scheme", None)
    return getattr(scheme, "weights", None) is not None or _is_of_transformers(module)


def _is_of_transformers(module: nn.Module) -> bool:
    return any(
        cls.__name__ == _OF_TRANSFORMERS and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def from_compressed(module: nn.Module, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """Return the layer with the same stored weight; what inputs are rounded to is left out.

    Raises:
        ValueError: Another format, or a weight that is dense already.
    """
    bias = module._parameters.get("bias")
    entries = {name: tensor.detach() for name, tensor in _tensors(module)}
    if _is_of_transformers(module):
        return _fp8(entries, bias, dtype)
    weights: Any = module.quantization_scheme.weights  # type: ignore[union-attr]
    status = getattr(getattr(module, "quantization_status", None), "value", None)
    if "weight_packed" not in entries and status != "compressed":
        raise ValueError(
            f"its weight is not compressed any more (quantization_status {status!r}): "
            "compressed-tensors makes dense weights at a model's first call, or with "
            "dequantize=True; load the model again and adapt it before it is called"
        )
    kind, bits = getattr(weights.type, "value", weights.type), int(weights.num_bits)
    strategy = getattr(weights.strategy, "value", weights.strategy)
    if any(entry.is_meta for entry in entries.values()):
        raise ValueError("its weight is on the meta device; load its weight first")
    if "weight_packed" in entries and kind == "int":
        return from_compressed_tensors(entries, bits, bias=bias, dtype=dtype)
    whole = strategy in ("tensor", "channel")
    if "weight" in entries and whole and kind == "float" and bits == 8:
        return _fp8(entries, bias, dtype)
    if "weight" in entries and whole and kind == "int" and bits == 8 and weights.symmetric:
        scales = entries["weight_scale"]
        rows = scales.reshape(-1).expand(len(entries["weight"])).contiguous()
        return Int8Linear.from_entries(
            {"weight": entries["weight"], "weight_scale_rows": rows},
            bias,
            dtype or scales.dtype,
        )
    raise ValueError(
        f"compressed-tensors' {bits}-bit {kind} with a scale by {strategy} is not read (integers "
        "in pack-quantized are, FP8 and symmetric int8 with a scale for a weight or a row); "
        f"{_WAY_OUT}"
    )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in own if tensor is not None and name != "bias"]


def _fp8(
    entries: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype | None
) -> QuantizedLinear:
    weight, scales = entries["weight"], entries["weight_scale"]
    rows = scales.float().reshape(-1, 1).expand(len(weight), 1).contiguous()
    if dtype is None:
        dtype = scales.dtype if scales.itemsize == 2 else torch.bfloat16
    return FP8Linear.from_entries({"weight": weight, "weight_scale_inv": rows}, bias, dtype)
