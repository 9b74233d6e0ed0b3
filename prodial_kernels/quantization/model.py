"""Quantising the frozen layers of a model in place, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from prodial_kernels._checks import check_choice
from prodial_kernels.module_patterns import matches_name
from prodial_kernels.module_tree import has_hooks, module_paths, replace_each
from prodial_kernels.quantization.convert import (
    FORMATS,
    QuantizationError,
    quantization_error,
    quantize_linear,
)
from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.saving import watch_saving


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_model` did.

    Attributes:
        format: The storage format.
        errors: What each layer's weight lost, by the layer's first dotted path.
        bytes_before: Bytes of the dense weights.
        bytes_after: Bytes of the stored weights, scales included.
    """

    format: str
    errors: Mapping[str, QuantizationError]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"{self.bytes_before / 2**20:,.1f} MiB -> {self.bytes_after / 2**20:,.1f} MiB"
        if not self.errors:
            return f"layers stored in {self.format}: {sizes}"
        path, worst = max(self.errors.items(), key=lambda item: item[1].relative_rms)
        return (
            f"{len(self.errors)} layers in {self.format}: {sizes}; largest error in {path}: {worst}"
        )


def quantize_model(
    model: nn.Module,
    format: str,
    *,
    target_modules: Iterable[str] = ("in_proj", "out_proj"),
) -> QuantizationReport:
    """Replace linear layers of ``model`` by quantised ones, in place; call it before adapting.

    Layers are replaced one at a time, so that memory falls from the first one on. The model itself
    is dense when this starts; :func:`from_state_dict` reads a quantised checkpoint by layers.
    ``save_pretrained`` of a model of transformers then writes the weights dense, because
    ``from_pretrained`` would take codes for weights.

    Args:
        model: A dense model.
        format: ``"nf4"``, ``"int8"`` or ``"fp8"``.
        target_modules: Names, or endings of dotted paths, of the layers to quantise.

    Raises:
        TypeError: A match that is not a dense ``nn.Linear`` in 16 or 32 bits.
        ValueError: An unknown format, a name that matches nothing, or a match whose weight another
            module shares, or that cannot be quantised. Checked before the first change but for
            the values of the weights.
    """
    check_choice("format", format, FORMATS)
    errors: dict[str, QuantizationError] = {}
    before = after = 0

    def quantized(path: str, dense: nn.Linear) -> QuantizedLinear:
        nonlocal before, after
        try:
            layer = quantize_linear(dense, format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
        errors[path] = quantization_error(dense.weight, layer)
        before += dense.weight.nbytes
        after += layer.packed_bytes
        return layer

    replace_each(model, nn.Linear, quantized, paths=find_layers(model, target_modules))
    watch_saving(model)
    return QuantizationReport(format, errors, before, after)


def make_dense(model: nn.Module) -> None:
    """Replace every quantised layer of ``model`` by a plain one with the weight it stands for."""
    replace_each(model, QuantizedLinear, lambda _, layer: layer.to_linear())  # type: ignore[type-abstract]


def find_layers(model: nn.Module, target_modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the dotted paths of each layer to quantise, of which a shared one has several.

    The model may be on the meta device. Arguments and errors are those of :func:`quantize_model`.
    """
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    paths = module_paths(model)
    matches = {
        module: found
        for module, found in paths.items()
        if any(matches_name(path, name) for path in found for name in names)
    }
    for name in names:
        if not any(matches_name(path, name) for found in matches.values() for path in found):
            raise ValueError(f"target_modules {name!r} matches no module of this model")
    for module, found in matches.items():
        _check_replaceable(module, found[0], paths)
    return list(matches.values())


def _check_replaceable(module: nn.Module, path: str, owners: Iterable[nn.Module]) -> None:
    """Raise unless ``module`` is a plain linear layer with a weight of its own."""
    if type(module) is not nn.Linear:
        raise TypeError(
            f"{path} is a {type(module).__module__}.{type(module).__name__}; only a plain "
            "nn.Linear can be quantised (before apply_prodial, and only once)"
        )
    if has_hooks(module):
        raise ValueError(f"{path} has hooks, which would be lost; remove them first")
    shared = [
        other
        for other in owners
        if other is not module and other._parameters.get("weight") is module.weight
    ]
    if shared:
        raise ValueError(
            f"{path} shares its weight with a {type(shared[0]).__name__}, which needs it dense; "
            "take it out of target_modules"
        )
