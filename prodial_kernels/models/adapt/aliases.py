"""Other references to a target, through which it would be used without the adapter.

An adapted layer replaces a layer at every path of the model's module tree. A module that refers to
the layer, or to its weight, in another way keeps the old one, on which the adapter has no effect
and from which it gets no gradient. Tied layers and embeddings share a weight but are layers of
their own: that is no second reference.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding

# Layers that may be tied to one another.
_TIED = (nn.Linear, QuantizedLinear, nn.Embedding, nn.EmbeddingBag)
# Attributes in which torch registers tensors and modules.
_REGISTERED = ("_parameters", "_buffers", "_modules")
_DEPTH = 4


def second_name(model: nn.Module, layers: Mapping[nn.Module, str]) -> tuple[str, str] | None:
    """Find a reference to one of ``layers``, or to its weight, outside the module tree.

    Checked are parameters and buffers that share the weight's memory, and plain attributes of
    modules: tensors, modules and bound methods, also in lists, tuples, sets, dicts, partials and
    closures.

    Args:
        model: What holds the layers.
        layers: Layers that are to be adapted, and a path of each.

    Returns:
        The path of the layer and the dotted name under which it is held, or None.
    """
    weights = [
        (tensor, path, layer) for layer, path in layers.items() for tensor in _weights(layer)
    ]
    by_storage: dict[int, list[tuple[Tensor, str, nn.Module]]] = {}
    for held in weights:
        by_storage.setdefault(_storage(held[0]), []).append(held)

    def found_in(tensor: Tensor, owner: nn.Module) -> str | None:
        for weight, path, layer in by_storage.get(_storage(tensor), ()):
            if owner is not layer and _overlap(tensor, weight):
                return path
        return None

    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(module, _TIED):
            for own, tensor in (*module._parameters.items(), *module._buffers.items()):
                path = None if tensor is None else found_in(tensor, module)
                if path is not None:
                    return path, prefix + own
        if type(module).__module__.startswith("torch.") or isinstance(module, QuantizedEmbedding):
            continue
        for own, value in vars(module).items():
            if own in _REGISTERED:
                continue
            for part in _parts(value):
                if isinstance(part, nn.Module):
                    path = None if part is module else layers.get(part)
                else:
                    path = found_in(part, module)
                if path is not None:
                    return path, prefix + own
    return None


def _weights(layer: nn.Module) -> list[Tensor]:
    """Return the tensors that an adapter changes the effect of: all but the bias."""
    named: Iterable[tuple[str, Tensor | None]] = (
        *layer._parameters.items(), *layer._buffers.items(),
    )  # fmt: skip
    return [tensor for name, tensor in named if tensor is not None and name != "bias"]


def _parts(value: Any, depth: int = _DEPTH) -> Iterator[Tensor | nn.Module]:
    """Yield the tensors and modules that a plain attribute holds."""
    if isinstance(value, Tensor | nn.Module):
        yield value
        return
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, FunctionType):
        inner = (
            *(_contents(cell) for cell in value.__closure__ or ()),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
        )
    if depth:
        for part in inner:
            yield from _parts(part, depth - 1)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Of a variable that has no value yet.
        return None


def _storage(tensor: Tensor) -> int:
    """Return an identity of the tensor's memory; of the tensor itself where it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage overlap; parts of one allocation need not."""
    if one is other:
        return True
    (begin, end), (first, last) = _extent(one), _extent(other)
    return begin < last and first < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel() or tensor.layout is not torch.strided:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((int(size) - 1) * int(stride) for size, stride in steps)
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + length * tensor.itemsize
