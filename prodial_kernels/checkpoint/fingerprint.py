"""Identifying a base model by the names, shapes and every value of its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels._checks import some_of
from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.hashing import hash_tensor
from prodial_kernels.checkpoint.sharded import whole
from prodial_kernels.module_tree import is_emptied_by_zero
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.modules.experts import QuantizedStack

_SAMPLES = 16
# Knuth's multiplicative hash: spreads the samples over rows and columns whatever the shape.
_STRIDE = 2654435761
# What values are rounded to when a model is loaded in another dtype.
_NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (),
    torch.float16: (),
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _NARROWER}

Linears = Mapping[str, nn.Linear | QuantizedLinear]
Values = Tensor | QuantizedLinear | QuantizedStack
"""A tensor, or the layer or stack whose weight it is, to be dequantised when it is looked at."""


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of every parameter's and buffer's name, shape, dtype and values.

    Equal for the same model loaded twice, different after any change to it. It takes as long as
    reading the model once: see :func:`~prodial_kernels.checkpoint.hashing.hash_tensor`.

    Raises:
        AdapterError: A tensor is on the meta device, so it has no values.
    """
    hashes = _Hashes()
    content = {
        name: hashes.of(tensor, _dense(name, tensor))
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_base(tensors: Mapping[str, Values], linears: Linears) -> dict[str, Any]:
    """Return the fingerprint of a base model, as JSON values.

    Args:
        tensors: Everything that the adapter was trained on and does not hold itself, by name.
        linears: The layers that it adapts, as they are without it, by dotted path.

    Raises:
        AdapterError: A tensor is on the meta device, or an adapted weight not finite.
    """
    for path, linear in linears.items():
        stored = linear.packed() if isinstance(linear, QuantizedLinear) else (linear.weight,)
        for tensor in stored:
            check_has_values(path, tensor)
            if not all_finite(whole(tensor)):
                raise AdapterError(
                    f"the base weight of {path} is not finite, so no adapter can be trained on it "
                    "or recognise it; load the base model again"
                )
    hashes = _Hashes()
    return {
        "layers": describe_layers(linears),
        "tensors": {name: _description(name, t, hashes) for name, t in tensors.items()},
    }


def check_values(
    saved: Mapping[str, Any], tensors: Mapping[str, Values], linears: Linears, origin: str
) -> None:
    """Raise AdapterError unless the model at hand has the very tensors that ``saved`` describes.

    Rounding to another floating-point dtype is the only difference that is accepted. Every value
    is compared, except between bfloat16 and float16, neither of which holds the other's: there, 16
    values of each tensor, to a bit of bfloat16. ``tensors`` and ``linears`` are the model's, as
    :func:`describe_base` takes them and gave ``saved``; ``origin`` is the adapter, for messages.
    """
    before: dict[str, Any] = saved["tensors"]
    lacking = sorted(before.keys() - tensors.keys())
    extra = sorted(tensors.keys() - before.keys())
    if lacking or extra:
        raise AdapterError(
            f"{origin} belongs to a model of other tensors: this one lacks "
            f"{some_of(lacking, 4) or 'none'} and has {some_of(extra, 4) or 'none'} beside. Load "
            "the very base model, in the class, it was trained in"
        )
    hashes = _Hashes()
    wrong = [
        name for name, tensor in tensors.items() if not _same(before[name], name, tensor, hashes)
    ]
    if wrong:
        raise AdapterError(
            f"{origin} was trained on other weights than this model's: they differ in "
            f"{len(wrong)} of {len(before)} tensors, first in {wrong[0]}. "
            + (
                _other_format(saved["layers"], linears)
                or _other_modules(before, tensors, linears)
                or "Load the very base model it was trained on: not another size or revision, not "
                "a fine-tuned or merged one"
            )
        )


def check_layers(saved: Mapping[str, Any], current: Mapping[str, Any], origin: str) -> None:
    """Raise AdapterError unless the adapted layers are the same, of the same shapes and formats.

    Raises KeyError for a layer that has other fields than :func:`describe_layers` gives one.
    """
    for path, layer in saved.items():
        if path in current and layer.keys() != current[path].keys():
            raise KeyError(f"{path} has {sorted(layer)}, not {sorted(current[path])}")
    if difference := _difference(saved, current):
        raise AdapterError(f"{origin} does not fit this model: {difference}")


def check_not_emptied(name: str, tensor: Tensor) -> None:
    """Raise AdapterError for a parameter that DeepSpeed's ZeRO-3 has divided."""
    if is_emptied_by_zero(tensor):
        raise AdapterError(
            f"{name} is divided among processes by DeepSpeed's ZeRO-3; in every process, enter "
            "deepspeed.zero.GatheredParameters(list(model.parameters())), and call save_adapter "
            "within it in the first one. Adapters are loaded before deepspeed.initialize"
        )


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raise AdapterError for a tensor on the meta device, or one that ZeRO-3 has divided."""
    check_not_emptied(name, tensor)
    if tensor.is_meta:
        raise AdapterError(
            f"{name} is on the meta device and has no values; load the weights first"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf; integers do not."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.dtype in _NARROWER else tensor.float()
    # A sum is an order of magnitude faster, and only wrong where it overflows itself.
    total = wide.detach().sum(dtype=torch.promote_types(wide.dtype, torch.float32))
    return bool(total.isfinite()) or bool(wide.isfinite().all())


class _Hashes:
    """A cache of hashes of a model's values, tied ones once; it must not outlive the model."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.dtype], str] = {}

    def of_stack(self, stack: QuantizedStack) -> str:
        """Hash of a mixture's experts, of which one at a time is dense."""
        key = (id(stack), torch.float32)
        if key not in self._known:
            # In fp32, whatever the model computes in.
            each = [hash_tensor(layer.dequantize(dtype=torch.float32)) for layer in stack]
            self._known[key] = hashlib.sha256("".join(each).encode()).hexdigest()
        return self._known[key]

    def of(
        self, values: Tensor | QuantizedLinear, tensor: Tensor, dtype: torch.dtype | None = None
    ) -> str:
        """Hash of ``tensor``, which is what ``values`` hold, rounded to ``dtype`` first."""
        dtype = tensor.dtype if dtype is None else dtype
        key = (id(values), dtype)
        if key not in self._known:
            self._known[key] = hash_tensor(tensor.detach().to(dtype))
        return self._known[key]


def describe_layers(linears: Linears) -> dict[str, Any]:
    """Return shape and storage format of the layers that an adapter sits on, as JSON values."""
    return {
        path: {
            "shape": [linear.out_features, linear.in_features],
            "format": linear.FORMAT if isinstance(linear, QuantizedLinear) else "dense",
        }
        for path, linear in linears.items()
    }


def _difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    for path, layer in saved.items():
        if path not in current:
            return f"it adapts {path}, which is no target here (these are: {', '.join(current)})"
        ours = current[path]
        if layer["shape"] != ours["shape"]:
            return (
                f"the weight of {path} must have shape [out_features, in_features] = "
                f"{layer['shape']}, got {ours['shape']}"
            )
    if extra := [path for path in current if path not in saved]:
        return f"it has nothing for {', '.join(extra)}, which its configuration targets"
    return ""


def _other_format(saved: Mapping[str, Any], linears: Linears) -> str:
    """Return advice where a layer's storage format differs from the saved one, or nothing."""
    for path, layer in describe_layers(linears).items():
        then, now = saved[path]["format"], layer["format"]
        if then != now:
            fix = (
                "load the model without quantising it"
                if then == "dense"
                else f"quantise the model to {then!r} first (--quantize {then})"
            )
            return f"It was trained on {path} stored as {then}, and here it is {now}: {fix}"
    return ""


def _other_modules(
    before: Mapping[str, Any], tensors: Mapping[str, Values], linears: Linears
) -> str:
    """Return advice where other layers than the adapted ones are stored otherwise, or nothing."""
    adapted = {f"{path}.weight" for path in linears}
    then = {name for name, each in before.items() if each.get("format") is not None} - adapted
    stored = (QuantizedLinear, QuantizedStack)
    now = {name for name, values in tensors.items() if isinstance(values, stored)} - adapted
    for name in sorted(then ^ now):
        was, wanted = ("stored", "all") if name in then else ("dense", "projectors")
        here = "dense" if name in then else "stored"
        return (
            f"It was trained beside {name} as {was}, and here it is {here}: quantise the same "
            f"modules (--quantize-modules {wanted})"
        )
    return ""


def _dense(name: str, values: Tensor | QuantizedLinear) -> Tensor:
    if isinstance(values, QuantizedLinear):
        values = values.with_storage(tuple(map(whole, values.packed()))).dequantize()
    check_has_values(name, values)
    return whole(values)


def _description(name: str, values: Values, hashes: _Hashes) -> dict[str, Any]:
    if isinstance(values, QuantizedStack):
        return _description_of_stack(values, hashes)
    tensor = _dense(name, values)
    stored = {"format": values.FORMAT} if isinstance(values, QuantizedLinear) else {}
    described: dict[str, Any] = {
        **stored,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "hash": hashes.of(values, tensor),
    }
    if tensor.dtype in _NARROWER:
        narrower = _NARROWER[tensor.dtype]
        described |= {str(d).removeprefix("torch."): hashes.of(values, tensor, d) for d in narrower}
        if not narrower:
            described["samples"] = samples(tensor)
    return described


def _description_of_stack(stack: QuantizedStack, hashes: _Hashes) -> dict[str, Any]:
    return {
        "shape": [len(stack), stack.out_features, stack.in_features],
        "format": stack.format,
        "stacked": True,
        "hash": hashes.of_stack(stack),
    }


def _same(saved: Mapping[str, Any], name: str, values: Values, hashes: _Hashes) -> bool:
    if isinstance(values, QuantizedStack) or saved.get("stacked"):
        return isinstance(values, QuantizedStack) and saved == _description_of_stack(values, hashes)
    tensor = _dense(name, values)
    own = str(tensor.dtype).removeprefix("torch.")
    if saved["shape"] != list(tensor.shape):
        return False
    if saved["dtype"] == own:
        return saved["hash"] == hashes.of(values, tensor)
    then = _DTYPES.get(saved["dtype"])
    if then is None or own not in _DTYPES:
        return False
    if own in saved:
        return saved[own] == hashes.of(values, tensor)
    if then in _NARROWER[tensor.dtype]:
        return saved["hash"] == hashes.of(values, tensor, then)
    return roundings_of_one(saved["samples"], samples(tensor))


def samples(tensor: Tensor) -> list[float]:
    """Values at fixed positions; the same in every dtype but for rounding."""
    count = tensor.numel()
    if count == 0:
        return []
    positions = torch.tensor([i * _STRIDE % count for i in range(_SAMPLES)])
    # By index rather than by reshape: a transposed weight must not be copied whole.
    index = torch.unravel_index(positions.to(tensor.device), tensor.shape)
    picked = tensor.detach()[index] if tensor.ndim else tensor.detach()
    return picked.reshape(-1).tolist()


def roundings_of_one(a: list[float], b: list[float]) -> bool:
    """Whether values in bfloat16 and in float16 may be roundings of the same values."""
    first, second = torch.tensor(a).double(), torch.tensor(b).double()
    difference = (first - second).abs()
    largest = torch.maximum(first.abs(), second.abs())
    # An ulp of bf16; and below 2^-14 fp16 keeps multiples of 2^-24 only.
    close = difference <= largest * 2**-7
    tiny = (largest <= 2**-14) & (difference <= 2**-24)
    return bool((close | tiny).all())
