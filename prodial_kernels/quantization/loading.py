"""Loading weights into a model on the meta device, quantising layer by layer: it is never dense.

model = ...                                  # built under torch.device("meta")
load_quantized(model, TensorFiles("falcon-mamba-7b"), "nf4", device="cuda")
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from prodial_kernels._checks import check_choice
from prodial_kernels.module_tree import module_paths, place
from prodial_kernels.quantization.convert import (
    FORMATS,
    QuantizationError,
    from_state_dict,
    quantization_error,
    quantize_linear,
)
from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.model import QuantizationReport, find_layers
from prodial_kernels.quantization.names import (
    SIGNS,
    check_dense_dtype,
    foreign_format,
    is_part_of_adapter,
    listed,
)
from prodial_kernels.quantization.saving import watch_saving


@torch.no_grad()
def load_quantized(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    format: str | None = None,
    *,
    device: torch.device | str,
    target_modules: Iterable[str] = ("in_proj", "out_proj"),
    rename: Callable[[str], str] | None = None,
    ignore: Iterable[str] = (),
    fill: Callable[[], None] | None = None,
) -> QuantizationReport:
    """Load a model tensor by tensor; the layers of ``target_modules`` are quantised as they come.

    At no time is there more than one dense weight of a layer that is to be quantised, on the
    host or the device. Layers that ``tensors`` holds in a format of
    :mod:`prodial_kernels.quantization`, such as those of a 4-bit checkpoint of bitsandbytes, stay
    in it, whether they are targets or not.

    Args:
        model: Its parameters are on the meta device, in the dtypes they shall have.
        tensors: A checkpoint by the names of its state dict, such as a ``TensorFiles``.
        format: ``"nf4"``, ``"int8"`` or ``"fp8"`` for the dense targets; None leaves them dense.
        device: Where the weights go.
        target_modules: Names, or endings of dotted paths, of the layers to quantise.
        rename: From a name of the checkpoint to the model's.
        ignore: Regular expressions for the model's names that it need not know.
        fill: Computes the buffers that no checkpoint holds; it is called in the end if the model
            has such, which are on ``device`` by then, without values.

    Returns:
        What was quantised here or read quantised; errors of the former.

    Raises:
        TypeError: A target that is not a plain ``nn.Linear``.
        ValueError: An unknown format or target, a tensor that is missing, unknown to the model or
            of another shape. The model is then partly loaded and of no use.
    """
    if format is not None:
        check_choice("format", format, FORMATS)
    names = {(rename(key) if rename else key): key for key in tensors}
    slots = _Slots(model)
    for name in names:
        if name not in slots and (whose := foreign_format(name)) is not None:
            raise ValueError(
                f"{names[name]} is of a layer quantised in a format that is not read: {whose}. Use "
                "the dense checkpoint, with --quantize where it is too large"
            )
    stored = _stored_layers(names, model)
    loader = _Loader(model, torch.device(device), format)
    targets = {
        f"{path}.weight": paths
        for paths in (() if format is None else find_layers(model, target_modules))
        for path in paths
    }
    unknown = []
    for name, key in names.items():
        layer = next((path for path in _parents(name) if path in stored), None)
        if layer is not None:
            if name == f"{layer}.weight":
                loader.read(layer, {e: tensors[k] for e, k in stored[layer].items()})
        elif name in targets:
            loader.quantize(targets[name], name, tensors[key])
        elif name in slots:
            slots.fill(name, tensors[key], loader.device)
        elif not any(re.search(pattern, name) for pattern in ignore) and not is_part_of_adapter(
            name, names
        ):
            unknown.append(name)
    if unknown:
        raise ValueError(f"the checkpoint holds what this model does not know: {listed(unknown)}")
    _fill_buffers(model, loader.device, fill)
    empty = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(f"the checkpoint lacks {listed(empty)}")
    watch_saving(model)
    return loader.report()


class _Loader:
    """Replaces a model's dense layers by quantised ones, and counts errors and bytes."""

    def __init__(self, model: nn.Module, device: torch.device, format: str | None) -> None:
        self.device = device
        self._model = model
        self._format = format or ""
        self._formats: set[str] = set()
        self._errors: dict[str, QuantizationError] = {}
        self._before = self._after = 0

    def quantize(self, paths: tuple[str, ...], name: str, weight: Tensor) -> None:
        """Quantise the layer at ``paths`` from its weight; its bias comes when it comes."""
        linear = self._model.get_submodule(paths[0])
        if not isinstance(linear, nn.Linear):
            return  # shared, and read under its other name
        dense = _fitting(name, weight, linear.weight).to(self.device, linear.weight.dtype)
        linear.weight = nn.Parameter(dense, requires_grad=False)
        try:
            layer = quantize_linear(linear, self._format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{paths[0]}: {error}") from error
        self._errors[paths[0]] = quantization_error(dense, layer)
        self._put(paths, layer, dense.nbytes)

    def read(self, path: str, entries: dict[str, Tensor]) -> None:
        """Take over a layer that the checkpoint holds quantised."""
        linear = self._model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            return
        dtype = linear.weight.dtype
        try:
            layer = from_state_dict(entries, dtype=dtype)
        except KeyError as error:
            raise ValueError(f"{path}: the checkpoint lacks its entry {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        shape = (layer.out_features, layer.in_features)
        if shape != linear.weight.shape or (layer.bias is None) != (linear.bias is None):
            raise ValueError(
                f"{path}: the checkpoint holds {layer.extra_repr()}, the model has {linear}"
            )
        # A copy in any case: the mapped file may not stay.
        layer = copy.deepcopy(layer) if self.device.type == "cpu" else layer
        paths = module_paths(self._model)[linear]
        self._put(paths, layer.to(self.device, dtype), linear.weight.nbytes)

    def report(self) -> QuantizationReport:
        """Return the report."""
        formats = " and ".join(sorted(self._formats)) or "no format"
        return QuantizationReport(formats, self._errors, self._before, self._after)

    def _put(self, paths: tuple[str, ...], layer: QuantizedLinear, dense_bytes: int) -> None:
        training = self._model.get_submodule(paths[0]).training
        place(self._model, paths, layer.train(training))
        self._formats.add(layer.FORMAT)
        self._before += dense_bytes
        self._after += layer.packed_bytes


class _Slots:
    """The places of a model's tensors by name; a shared tensor has several."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._of: dict[str, list[tuple[str, str]]] = {}
        shared: dict[int, list[tuple[str, str]]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and leaf not in module._non_persistent_buffers_set:
                    places = shared.setdefault(id(tensor), [])
                    places.append((path, leaf))
                    self._of[f"{path}.{leaf}" if path else leaf] = places

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def fill(self, name: str, tensor: Tensor, device: torch.device) -> None:
        """Load one tensor, unless it is tied and was read under its other name."""
        path, leaf = self._of[name][0]
        like = getattr(self._model.get_submodule(path), leaf)
        if not like.is_meta:
            return
        # A copy in any case: the mapped file may not stay.
        value = _fitting(name, tensor, like).to(device, like.dtype, copy=True)
        if isinstance(like, nn.Parameter):
            value = nn.Parameter(value, requires_grad=like.requires_grad)
            # Markers such as mamba_ssm's _no_weight_decay.
            vars(value).update(vars(like))
        for path, leaf in self._of[name]:
            setattr(self._model.get_submodule(path), leaf, value)


def _stored_layers(theirs: Mapping[str, str], model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the layers stored quantised: path -> entry of the format -> name in the checkpoint."""
    stored: dict[str, dict[str, str]] = {}
    for name in theirs:
        path = next((name.removesuffix(f".{s}") for s in SIGNS if name.endswith(f".{s}")), None)
        if path is not None:
            stored[path] = {}
    for name, key in theirs.items():
        for path in _parents(name):
            if path in stored:
                stored[path][name.removeprefix(f"{path}.")] = key
    for path in stored:
        try:
            linear = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"the checkpoint holds {path} quantised, and this model has no such layer"
            ) from error
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"the checkpoint holds {path} quantised, which here is a {type(linear).__name__}"
            )
    return stored


def _parents(name: str) -> list[str]:
    """``a.b.c`` -> ``a.b`` and ``a``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _fitting(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} in the checkpoint, {list(like.shape)} in the "
            "model; its configuration belongs to another checkpoint"
        )
    if like.is_floating_point():
        stored = str(tensor.dtype).removeprefix("torch.")
        check_dense_dtype(name, stored)
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} is stored as {stored}, where the model has floating-point numbers: these "
                "may be codes of a quantised weight. Use the dense checkpoint, or fetch this one "
                "again"
            )
    return tensor


def _fill_buffers(model: nn.Module, device: torch.device, fill: Callable[[], None] | None) -> None:
    filled = False
    for path, module in model.named_modules():
        names = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        computed = [name for name in names if name in module._non_persistent_buffers_set]
        if not computed:
            continue
        if fill is None:
            raise ValueError(
                f"{path or 'the model'} computes {listed(computed)} when it is built, and was "
                "built on the meta device; pass fill, which computes them"
            )
        for name in computed:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        filled = True
    if filled and fill is not None:
        fill()
