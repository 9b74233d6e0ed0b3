"""Results between blocks that share one graph: tensors without content until somebody reads them.

A block that shares its graph with the next returns a :class:`Deferred`, a tensor with metadata and
without content. The next block takes it, and the call of the last one replays the graph. If
anything else reads a deferred tensor, the deferred calls run eagerly and give its content.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Metadata that a tensor without content has.
_KNOWN = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in (
                "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_meta",
                "is_sparse", "is_quantized", "is_nested",
            )
        ),
        *(
            getattr(Tensor, name)
            for name in (
                "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride",
                "is_floating_point", "is_complex", "get_device",
            )
        ),
    ]
)  # fmt: skip


class Unreadable(RuntimeError):
    """The content of a block's result was not kept, or cannot be given with its gradient."""


class Deferral:
    """The deferred calls of one section, until its last block is called.

    Attributes:
        over: Whether the graph has been replayed instead, so that nothing can be read any more.
    """

    def __init__(
        self,
        name: str,
        device_type: str,
        autocast: tuple[bool, torch.dtype],
        read: Callable[[], None] | None = None,
    ) -> None:
        """Begin without calls; ``read`` is called when a result is read.

        ``name`` is the section's, for messages; ``autocast`` says whether it is on for
        ``device_type``, and its dtype.
        """
        self.name = name
        self.over = False
        self.read = read
        self._autocast = device_type, autocast
        self._calls: list[tuple[Callable[[Sequence[Any]], list[Tensor]], list[Tensor | int]]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._given: list[list[weakref.ref[Tensor]]] = []
        self._values: list[list[Tensor]] | None = None

    def add(
        self, function: Callable[[Sequence[Any]], list[Tensor]], leaves: Sequence[Tensor]
    ) -> None:
        """Defer ``function(leaves)``, the call of the next block."""
        # What is read later must be what it is now.
        self._versions += [(leaf, leaf._version) for leaf in leaves if type(leaf) is not Deferred]
        self._calls.append(
            (function, [leaf.number if type(leaf) is Deferred else leaf for leaf in leaves])
        )

    def results(self, given: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Tensor]:
        """Return deferred tensors for the call added last, one for each (kind, stride)."""
        block = len(self._given)
        found: list[Tensor] = [
            Deferred.make(self, block, number, kind, stride)
            for number, (kind, stride) in enumerate(given)
        ]
        self._given.append([weakref.ref(one) for one in found])
        return found

    def is_last(self, leaf: Tensor, number: int) -> bool:
        """Whether ``leaf`` is result ``number`` of the call added last."""
        return self._values is None and self._given[-1][number]() is leaf

    def kept(self) -> bool:
        """Whether somebody still refers to a result of a call before the last."""
        return any(one() is not None for found in self._given[:-1] for one in found)

    def begin(self) -> None:
        """Drop the deferred calls: the graph is replayed; Unreadable if an input has changed."""
        self._check()
        self.over = True
        self._calls.clear()
        self._versions.clear()

    def value(self, block: int, number: int) -> Tensor:
        """Return a result; the deferred calls run eagerly at the first read, or Unreadable."""
        if self.over:
            raise Unreadable(
                f"what a block of {self.name} returned is read after the last of them has run, "
                "which are captured together, so it was not kept. Release the captured blocks to "
                "read it"
            )
        if self._values is None:
            self._check()
            if self.read is not None:
                self.read()
            values: list[list[Tensor]] = []
            device_type, (enabled, dtype) = self._autocast
            with torch.enable_grad(), torch.autocast(device_type, dtype=dtype, enabled=enabled):
                for function, leaves in self._calls:
                    given = [values[-1][leaf] if isinstance(leaf, int) else leaf for leaf in leaves]
                    values.append(function(given))
            self._values = values
            self._calls.clear()
            self._versions.clear()
        return self._values[block][number]

    def _check(self) -> None:
        if any(leaf._version != version for leaf, version in self._versions):
            raise Unreadable(
                f"an input of {self.name}, which are captured together, was changed in place "
                "before the last of them was called. Release the captured blocks to do that"
            )


class Deferred(Tensor):
    """A result of a block that has not run; shape, strides, dtype and device are known."""

    deferral: Deferral
    block: int
    number: int
    kind: Any

    @staticmethod
    def make(
        deferral: Deferral, block: int, number: int, kind: Any, stride: tuple[int, ...]
    ) -> Deferred:
        """Make the ``number``-th result of the ``block``-th call."""
        made: Deferred = Tensor._make_wrapper_subclass(
            Deferred, kind.shape, strides=stride, dtype=kind.dtype, device=kind.device,
            requires_grad=kind.requires_grad,
        )  # fmt: skip
        made.deferral, made.block, made.number, made.kind = deferral, block, number, kind
        if kind.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_refuse)
        return made

    def content(self) -> Tensor:
        """Return the tensor with its content; Unreadable where that was not kept."""
        return self.deferral.value(self.block, self.number)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer what metadata answers; anything else takes the content."""
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*with_content(args), **with_content(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse: content given below autograd would have no gradient."""
        raise Unreadable(_LOST)


_LOST = (
    "a block's result is used between blocks that are captured together, by a function of autograd "
    "that cannot be told so. Release the captured blocks to do that"
)


def _refuse(gradient: Tensor) -> None:
    raise Unreadable(_LOST)


def with_content(value: Any) -> Any:
    """Return nested tuples, lists and dictionaries with content in place of each deferred tensor.

    Raises:
        Unreadable: The content was not kept.
    """
    if type(value) is Deferred:
        return value.content()
    if type(value) in (tuple, list):
        return type(value)([with_content(part) for part in value])
    if type(value) is dict:
        return {key: with_content(part) for key, part in value.items()}
    return value
