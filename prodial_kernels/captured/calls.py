"""A call of a block as a structure and a list of tensors, to compare calls and to repeat them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prodial_kernels.captured.deferred import Deferred

IRRELEVANT = frozenset(("num_items_in_batch",))
"""Arguments that transformers gives every block and no block reads; they differ by step."""

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_LEAF = "tensor"


class Uncapturable(Exception):
    """An argument or a result that no graph can hold; the message says which."""


class Kind(NamedTuple):
    """The properties of a tensor that every call replayed by one graph must share."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def kind_of(tensor: Tensor) -> Kind:
    """Return the properties of a tensor."""
    if type(tensor) is Deferred:
        kind: Kind = tensor.kind
        return kind
    return Kind(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


def flatten(value: Any, leaves: list[Tensor], name: str = "the result") -> Hashable:
    """Return the structure of nested tuples, lists and dictionaries; collect their tensors.

    Args:
        value: Tensors, numbers, strings, None, and tuples, lists and dictionaries of them.
        leaves: The tensors are appended here, in order.
        name: Of the value, for the message.

    Raises:
        Uncapturable: Something else is in it, such as a cache.
    """
    cls = type(value)
    if cls is Tensor or cls is nn.Parameter or cls is Deferred:
        leaves.append(value)
        return _LEAF
    if cls in _CONSTANTS:
        return cls, value
    if cls is tuple or cls is list:
        return cls, tuple([flatten(part, leaves, name) for part in value])
    if cls is dict:
        return cls, tuple([(key, flatten(part, leaves, name)) for key, part in value.items()])
    raise Uncapturable(f"{name} is or holds a {cls.__name__}")


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """Return the structure of a call's arguments, and the tensors in them.

    Raises:
        Uncapturable: An argument that no graph can hold.
    """
    leaves: list[Tensor] = []
    positional = tuple(
        [flatten(value, leaves, f"argument {number}") for number, value in enumerate(args)]
    )
    named = tuple(
        [
            (name, flatten(value, leaves, f"argument {name!r}"))
            for name, value in kwargs.items()
            if name not in IRRELEVANT
        ]
    )
    return (positional, named), leaves


def rebuild(structure: Any, leaves: Iterator[Tensor]) -> Any:
    """The inverse of :func:`flatten`, with other tensors."""
    if structure == _LEAF:
        return next(leaves)
    cls, content = structure
    if cls is tuple or cls is list:
        return cls([rebuild(part, leaves) for part in content])
    if cls is dict:
        return {key: rebuild(part, leaves) for key, part in content}
    return content


def rebuild_call(structure: Any, leaves: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of :func:`flatten_call`, with other tensors."""
    positional, named = structure
    tensors = iter(leaves)
    args = [rebuild(part, tensors) for part in positional]
    return args, {name: rebuild(part, tensors) for name, part in named}
