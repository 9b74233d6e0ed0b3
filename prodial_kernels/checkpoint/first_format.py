"""Reading adapters in format 1, as prodial-kernels 0.1.0 wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.fingerprint import (
    Linears,
    check_has_values,
    check_layers,
    roundings_of_one,
    samples,
)
from prodial_kernels.scale_versions import from_first_version

_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def convert_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in today's form: the scale, stored as s, becomes s − 1."""
    return {
        name: from_first_version(t) if name.rpartition(".")[2] == "prodial_scale" else t
        for name, t in tensors.items()
    }


def check_first_base(saved: Mapping[str, Any], linears: Linears, origin: str) -> None:
    """Raise AdapterError unless ``linears`` are the layers that ``saved`` describes.

    Format 1 kept the shape and 16 values of each adapted weight, and nothing else of the model.
    ``origin`` is what the message calls the adapter and its base.
    """
    layers: dict[str, Any] = saved["layers"]
    shapes = {path: layer["shape"] for path, layer in layers.items()}
    structure = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    if saved["structure"] != structure:
        raise AdapterError(
            f"{origin} describes its base model in a way that contradicts itself: it was changed "
            "after it was saved; copy it again from where it was saved"
        )
    weights = {path: linear.weight for path, linear in linears.items()}
    for path, weight in weights.items():
        check_has_values(path, weight)
    current = {p: {"shape": list(w.shape), "samples": None} for p, w in weights.items()}
    check_layers(layers, current, origin)
    wrong = [
        path
        for path, layer in layers.items()
        if not _same_but_for_rounding(layer["samples"], samples(weights[path]))
    ]
    if wrong:
        raise AdapterError(
            f"{origin} was trained on other weights than this model's: they differ in "
            f"{len(wrong)} of {len(layers)} layers, first in {wrong[0]}. Load the very base model "
            "it was trained on: not another size or revision, not a fine-tuned or merged one"
        )


def _same_but_for_rounding(a: list[float], b: list[float]) -> bool:
    first, second = torch.tensor(a).double(), torch.tensor(b).double()
    formats = {_coarsest_format(first), _coarsest_format(second)}
    if formats == {torch.bfloat16, torch.float16}:
        return roundings_of_one(a, b)
    coarser = next((f for f in _FORMATS if f in formats), torch.float64)
    close = first.to(coarser) == second.to(coarser)
    if torch.float32 not in formats and torch.float64 not in formats:
        # Below 2^-14 fp16 keeps multiples of 2^-24 only, whatever else the values went through.
        largest = torch.maximum(first.abs(), second.abs())
        close |= (largest <= 2**-14) & ((first - second).abs() <= 2**-24)
    return first.shape == second.shape and bool(close.all())


def _coarsest_format(values: Tensor) -> torch.dtype:
    """The narrowest format that holds all ``values`` exactly."""
    for candidate in _FORMATS:
        if torch.equal(values.to(candidate).double(), values):
            return candidate
    return torch.float64
