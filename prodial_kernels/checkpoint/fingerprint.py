"""Which model is this: its layers' names and shapes, and a few values of every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.quantization import QuantizedLinear

_SAMPLES = 16
# Knuth's multiplicative hash: spreads the samples over rows and columns whatever the shape.
_STRIDE = 2654435761
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of every parameter's and buffer's name, shape, dtype and sampled values.

    Equal for the same model loaded twice, different after any training of it.

    Raises:
        AdapterError: A tensor is on the meta device, so it has no values.
    """
    content = {
        name: (list(tensor.shape), str(tensor.dtype), [str(v) for v in _samples(name, tensor)])
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_base(linears: Mapping[str, nn.Linear | QuantizedLinear]) -> dict[str, Any]:
    """Return the fingerprint of the frozen layers an adapter sits on, as JSON values.

    Args:
        linears: The plain layers by the dotted path of the layer (adapted or not).

    Raises:
        AdapterError: A weight is on the meta device or not finite.
    """
    layers = {}
    for path, linear in linears.items():
        samples = _samples(path, linear.weight)
        if not torch.tensor(samples).isfinite().all():
            raise AdapterError(
                f"the base weight of {path} is not finite, so no adapter can be trained on it or "
                "recognise it; load the base model again"
            )
        layers[path] = {"shape": list(linear.weight.shape), "samples": samples}
    return {"structure": _structure(layers), "layers": layers}


def check_base(
    saved: Mapping[str, Any], linears: Mapping[str, nn.Linear | QuantizedLinear], origin: str
) -> None:
    """Raise AdapterError unless ``linears`` are the layers that ``saved`` describes.

    Rounding to another dtype is the only difference that is accepted: both sides are rounded to
    the coarser of their formats and must then be equal.

    Args:
        saved: :func:`describe_base` of the model the adapter was trained on.
        linears: As for :func:`describe_base`, of the model at hand.
        origin: What the message calls the adapter and its base.
    """
    layers: dict[str, Any] = saved["layers"]
    current = describe_base(linears)["layers"]
    if saved["structure"] != _structure(current):
        raise AdapterError(f"{origin} does not fit this model: {_difference(layers, current)}")
    wrong = [
        path
        for path, layer in layers.items()
        if not _same_but_for_rounding(layer["samples"], current[path]["samples"])
    ]
    if wrong:
        raise AdapterError(
            f"{origin} was trained on other weights than this model's: they differ in "
            f"{len(wrong)} of {len(layers)} layers, first in {wrong[0]}. Load the very base model "
            "it was trained on: not another size or revision, not a fine-tuned or merged one"
        )


def _structure(layers: Mapping[str, Any]) -> str:
    shapes = {path: layer["shape"] for path, layer in layers.items()}
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def _difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    for path in saved:
        if path not in current:
            return f"it adapts {path}, which is no target here (these are: {', '.join(current)})"
        if saved[path]["shape"] != current[path]["shape"]:
            return (
                f"the weight of {path} must have shape [out_features, in_features] = "
                f"{saved[path]['shape']}, got {current[path]['shape']}"
            )
    extra = [path for path in current if path not in saved]
    return f"it has nothing for {', '.join(extra)}, which its configuration targets"


def _samples(name: str, tensor: Tensor) -> list[Any]:
    """Values at fixed positions; the same in every dtype but for rounding."""
    if tensor.is_meta:
        raise AdapterError(
            f"{name} is on the meta device and has no values to recognise the model by; load the "
            "weights first"
        )
    count = tensor.numel()
    if count == 0:
        return []
    positions = torch.tensor([i * _STRIDE % count for i in range(_SAMPLES)])
    # By index rather than by reshape: a transposed weight must not be copied whole.
    index = torch.unravel_index(positions.to(tensor.device), tensor.shape)
    picked = tensor.detach()[index] if tensor.ndim else tensor.detach()
    return picked.reshape(-1).tolist()


def _same_but_for_rounding(a: list[float], b: list[float]) -> bool:
    first, second = torch.tensor(a).double(), torch.tensor(b).double()
    formats = {_coarsest_format(first), _coarsest_format(second)}
    difference = (first - second).abs()
    largest = torch.maximum(first.abs(), second.abs())
    if formats == {torch.bfloat16, torch.float16}:
        # Neither holds the other: both are roundings of the same value, one ulp of bf16 apart.
        close = difference <= largest * 2**-7
    else:
        coarser = next((f for f in _FORMATS if f in formats), torch.float64)
        close = first.to(coarser) == second.to(coarser)
    # Below 2^-14 fp16 keeps multiples of 2^-24 only, whatever else the values went through.
    tiny = (largest <= 2**-14) & (difference <= 2**-24)
    return bool((close | tiny).all())


def _coarsest_format(values: Tensor) -> torch.dtype:
    """The narrowest format that holds all ``values`` exactly."""
    for candidate in _FORMATS:
        if torch.equal(values.to(candidate).double(), values):
            return candidate
    return torch.float64
