"""Loading weights into a model on the meta device, quantising layer by layer: it is never dense.

model = ...                                  # built under torch.device("meta")
load_quantized(model, TensorFiles("falcon-mamba-7b"), "nf4", device="cuda")
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

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
from prodial_kernels.quantization.model import (
    QuantizationReport,
    ReportBuilder,
    put_expert,
    select,
)
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack
from prodial_kernels.quantization.modules.selection import PROJECTORS, TIED, Selection, kind_of
from prodial_kernels.quantization.names import (
    SIGNS,
    check_dense_dtype,
    foreign_format,
    is_part_of_adapter,
    listed,
)
from prodial_kernels.quantization.saving import watch_saving


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint that is a part of one of the model's: of a mixture's experts.

    Attributes:
        name: The model's tensor [experts, out, in].
        index: The expert.
        order: Of the tensors that make up that expert's weight, one below the other, which.
        of: How many these are.
    """

    name: str
    index: int
    order: int = 0
    of: int = 1


@torch.no_grad()
def load_quantized(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    format: str | None = None,
    *,
    device: torch.device | str,
    target_modules: Iterable[str] = PROJECTORS,
    exclude: Iterable[str] = (),
    rename: Callable[[str], str | Piece] | None = None,
    ignore: Iterable[str] = (),
    experts_on_host: bool = False,
    fill: Callable[[], None] | None = None,
) -> QuantizationReport:
    """Load a model tensor by tensor; the layers of ``target_modules`` are quantised as they come.

    At no time is there more than one dense weight of a layer that is to be quantised, on the
    host or the device; of a mixture, of one expert, where the checkpoint keeps them apart or can be
    read in parts, as a ``TensorFiles`` can. Layers that ``tensors`` holds in a format of
    :mod:`prodial_kernels.quantization`, such as those of a 4-bit checkpoint of bitsandbytes, stay
    in it, whether they are targets or not.

    Args:
        model: Its parameters are on the meta device, in the dtypes they shall have.
        tensors: A checkpoint by the names of its state dict, such as a ``TensorFiles``.
        format: ``"nf4"``, ``"int8"`` or ``"fp8"`` for the dense targets; None leaves them dense.
        device: Where the weights go.
        target_modules: As for :func:`~prodial_kernels.quantization.quantize_model`, ``"all"``
            included.
        exclude: Likewise.
        rename: From a name of the checkpoint to the model's, or to the part of a tensor that it is.
        ignore: Regular expressions for the model's names that it need not know.
        experts_on_host: Whether a mixture's experts, where they are quantised, stay in the host's
            memory and come to ``device`` when they are used.
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
    names: dict[str, str] = {}
    pieces: dict[str, dict[tuple[int, int], str]] = {}
    for key in tensors:
        name = rename(key) if rename else key
        if isinstance(name, Piece):
            pieces.setdefault(name.name, {})[name.index, name.order] = key
        else:
            names[name] = key
    slots = _Slots(model)
    for name in names:
        if name not in slots and (whose := foreign_format(name)) is not None:
            raise ValueError(
                f"{names[name]} is of a layer quantised in a format that is not read: {whose}. Use "
                "the dense checkpoint, with --quantize where it is too large"
            )
    stored = _stored_layers(names, model)
    chosen = Selection(()) if format is None else select(model, target_modules, exclude)
    if experts_on_host and not chosen.experts:
        raise ValueError(
            "experts_on_host is for a mixture's experts that are quantised here, and this model "
            "has none; leave it out"
        )
    loader = _Loader(model, torch.device(device), format, chosen, experts_on_host)
    unknown = []
    for name, key in names.items():
        layer = next((path for path in _parents(name) if path in stored), None)
        if layer is not None:
            if name == f"{layer}.weight":
                loader.read(layer, {e: tensors[k] for e, k in stored[layer].items()})
        elif loader.takes(name):
            loader.quantize(name, tensors, key)
        elif name in slots:
            slots.fill(name, tensors[key], loader.device)
        elif not any(re.search(pattern, name) for pattern in ignore) and not is_part_of_adapter(
            name, names
        ):
            unknown.append(name)
    for name, parts in pieces.items():
        if name not in slots:
            unknown.append(name)
            continue
        by_expert = _whole_pieces(name, parts, slots.like(name))
        if loader.takes(name):
            loader.quantize_pieces(name, tensors, by_expert)
        else:
            slots.fill_pieces(name, tensors, by_expert, loader.device)
    if unknown:
        raise ValueError(f"the checkpoint holds what this model does not know: {listed(unknown)}")
    loader.finish()
    _fill_buffers(model, loader.device, fill)
    empty = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(f"the checkpoint lacks {listed(empty)}")
    watch_saving(model)
    return loader.report()


class _Loader:
    """Replaces a model's dense layers by quantised ones, and counts errors and bytes."""

    def __init__(
        self, model: nn.Module, device: torch.device, format: str | None, chosen: Selection,
        experts_on_host: bool,
    ) -> None:  # fmt: skip
        self.device = device
        self._on_host = experts_on_host
        self._model = model
        self._format = format or ""
        self._chosen = chosen
        self._builder = ReportBuilder()
        self._linears = {f"{path}.weight": found for found in chosen.linears for path in found}
        self._tables = {f"{path}.weight": found for found in chosen.embeddings for path in found}
        for tables, layers in chosen.tied:
            self._linears.update({f"{path}.weight": layers for path in (*tables, *layers)})
        self._experts = {
            f"{path}.{name}": found
            for found in chosen.experts
            for path in found
            for name in model.get_submodule(path)._parameters
        }
        tied = {layers[0] for _, layers in chosen.tied}
        self._kinds = {
            found[0]: TIED if found[0] in tied else kind_of(found[0], model)
            for found in (*self._linears.values(), *self._tables.values())
        }
        self._stacks: dict[str, dict[str, QuantizedStack]] = {}
        self._lost: dict[str, list[tuple[int, QuantizationError]]] = {}
        self._dense_bytes: Counter[str] = Counter()

    def takes(self, name: str) -> bool:
        """Whether the tensor ``name`` of the model is stored."""
        return name in self._linears or name in self._tables or name in self._experts

    def quantize(self, name: str, tensors: Mapping[str, Tensor], key: str) -> None:
        """Store the weight ``name`` from the checkpoint's ``key``; a bias comes when it comes."""
        if name in self._experts:
            self._quantize_stack(name, tensors, key)
            return
        is_table = name in self._tables
        paths = (self._tables if is_table else self._linears)[name]
        module: Any = self._model.get_submodule(paths[0])
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            return  # shared, and read under its other name
        like = module.weight
        dense = _fitting(name, tensors[key], like).to(self.device, like.dtype)
        linear = module
        if is_table:
            linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(dense, requires_grad=False)
        try:
            layer = quantize_linear(linear, self._format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{paths[0]}: {error}") from error
        lost = quantization_error(dense, layer)
        self._builder.add(
            paths[0], self._kinds[paths[0]], layer.FORMAT, dense.nbytes, layer.packed_bytes,
            [(dense.numel(), lost)],
        )  # fmt: skip
        if is_table:
            new = QuantizedEmbedding(layer, tied=False, padding_idx=module.padding_idx)
            place(self._model, paths, new.train(module.training))
        else:
            place(self._model, paths, layer.train(module.training))

    def quantize_pieces(
        self, name: str, tensors: Mapping[str, Tensor], pieces: Mapping[int, list[str]]
    ) -> None:
        """Store the experts' weight ``name``, expert by expert."""
        like = self._like(name)
        for index, keys in pieces.items():
            dense = _joined(name, tensors, keys, like[0])
            self._put(name, index, len(like), dense.to(self.device, like.dtype))

    def _quantize_stack(self, name: str, tensors: Mapping[str, Tensor], key: str) -> None:
        like = self._like(name)
        for index in range(len(like)):
            dense = _fitting(f"{name}[{index}]", _part_of(tensors, key, index), like[0])
            self._put(name, index, len(like), dense.to(self.device, like.dtype))

    def _like(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return cast(Tensor, self._model.get_submodule(path)._parameters[leaf])

    def _put(self, name: str, index: int, count: int, dense: Tensor) -> None:
        leaf = name.rpartition(".")[2]
        path = self._experts[name][0]
        stacks = self._stacks.setdefault(path, {})
        stack = put_expert(stacks, leaf, index, count, dense, self._format, path, self._on_host)
        self._dense_bytes[path] += dense.nbytes
        lost = quantization_error(dense, stack[index])
        self._lost.setdefault(path, []).append((dense.numel(), lost))

    def finish(self) -> None:
        """Put experts and tied embeddings where they belong, when all tensors were read."""
        for found in self._chosen.experts:
            experts = self._model.get_submodule(found[0])
            stacks = self._stacks.get(found[0], {})
            lacking = [
                f"{found[0]}.{name}[{index}]"
                for name in experts._parameters
                for index in (stacks[name].missing if name in stacks else range(1))
            ]
            if lacking:
                raise ValueError(f"the checkpoint lacks {listed(lacking)}")
            ordered = {name: stacks[name] for name in experts._parameters}
            after = sum(stack.packed_bytes for stack in ordered.values())
            place(self._model, found, QuantizedExperts(experts, ordered))
            self._builder.add(
                found[0], "experts", self._format, self._dense_bytes[found[0]], after,
                self._lost[found[0]],
            )  # fmt: skip
        for tables, layers in self._chosen.tied:
            table = self._model.get_submodule(layers[0])
            embedding: Any = self._model.get_submodule(tables[0])
            if isinstance(table, QuantizedLinear):
                new = QuantizedEmbedding(table, tied=True, padding_idx=embedding.padding_idx)
                place(self._model, tables, new.train(embedding.training))

    def read(self, path: str, entries: dict[str, Tensor]) -> None:
        """Take over a layer that the checkpoint holds quantised."""
        linear = self._model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            return
        dtype = linear.weight.dtype
        if "weight" in entries:
            entries["weight"] = unflattened(entries["weight"], linear.weight)
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
        kind = kind_of(path, self._model)
        paths = module_paths(self._model)[linear]
        layer = layer.to(self.device, dtype)
        self._builder.add(paths[0], kind, layer.FORMAT, linear.weight.nbytes, layer.packed_bytes)
        place(self._model, paths, layer.train(linear.training))

    def report(self) -> QuantizationReport:
        """Return the report."""
        return self._builder.report()


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

    def like(self, name: str) -> Tensor:
        """The model's tensor of that name."""
        path, leaf = self._of[name][0]
        return cast(Tensor, getattr(self._model.get_submodule(path), leaf))

    def fill_pieces(
        self, name: str, tensors: Mapping[str, Tensor], pieces: Mapping[int, list[str]],
        device: torch.device,
    ) -> None:  # fmt: skip
        """Load one tensor [experts, out, in] from the checkpoint's tensors of its experts."""
        like = self.like(name)
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
        for index, keys in pieces.items():
            whole[index].copy_(_joined(name, tensors, keys, like[0]))
        self.fill(name, whole, device)

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


def _whole_pieces(
    name: str, pieces: Mapping[tuple[int, int], str], like: Tensor
) -> dict[int, list[str]]:
    """Return the checkpoint's names of each expert's tensors, or raise where some are missing."""
    orders = 1 + max(order for _, order in pieces)
    wanted = [(index, order) for index in range(len(like)) for order in range(orders)]
    lacking = [f"{name}[{index}]" for index, order in wanted if (index, order) not in pieces]
    if lacking:
        raise ValueError(f"the checkpoint lacks {listed(lacking)}")
    if extra := pieces.keys() - set(wanted):
        raise ValueError(
            f"the checkpoint holds {listed(pieces[place] for place in extra)}, and {name} of this "
            f"model has {len(like)} experts; its configuration belongs to another checkpoint"
        )
    return {index: [pieces[index, order] for order in range(orders)] for index in range(len(like))}


def _joined(name: str, tensors: Mapping[str, Tensor], keys: list[str], like: Tensor) -> Tensor:
    """One expert's weight [out, in], of the tensors that stand one below the other in it."""
    parts = [tensors[key] for key in keys]
    fits = all(p.ndim == 2 and p.shape[1] == like.shape[1] and p.is_floating_point() for p in parts)
    if not fits or sum(len(part) for part in parts) != len(like):
        raise ValueError(
            f"{', '.join(keys)} of the checkpoint have shapes {[list(p.shape) for p in parts]} "
            f"({', '.join({str(p.dtype) for p in parts})}), which together are no expert "
            f"{list(like.shape)} of {name}; its configuration belongs to another checkpoint"
        )
    for key, part in zip(keys, parts, strict=True):
        check_dense_dtype(key, str(part.dtype).removeprefix("torch."))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _part_of(tensors: Mapping[str, Tensor], key: str, index: int) -> Tensor:
    """One expert of a tensor [experts, out, in]; nothing else is read where it can be."""
    read: Callable[[str, int], Tensor] | None = getattr(tensors, "part", None)
    return tensors[key][index] if read is None else read(key, index)


def unflattened(stored: Tensor, like: Tensor) -> Tensor:
    """Return codes that a checkpoint holds flat, a byte for each weight, in the shape of ``like``.

    e4m3 codes are written as uint8, which no loader casts.
    """
    if stored.ndim != 1 or stored.numel() != like.numel():
        return stored
    codes = stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored
    return codes.reshape(like.shape)


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
