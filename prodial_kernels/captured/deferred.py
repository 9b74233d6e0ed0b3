"""Blocks that run as one graph: what is known of the result of one before the last has been called.

The call of a block that is captured together with the next returns a :class:`Deferred`, a tensor
without content. The next block's call takes it, and that of the last replays the graph of them all.
Whatever else reads one gets its content: the blocks until there run as they are, late.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# What may be asked of a tensor without content.
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
    """The content of a block's result was not kept, or not in a way that a gradient would need."""


class Deferral:
    """Calls of blocks that wait for that of the last one that is captured with them.

    Attributes:
        over: Why nothing can be read any more: the graph has run instead.
    """

    def __init__(
        self,
        name: str,
        device_type: str,
        autocast: tuple[bool, torch.dtype],
        read: Callable[[], None] | None = None,
    ) -> None:
        """Begin with none.

        Args:
            name: Of the blocks, for messages.
            device_type: Of autocast.
            autocast: Whether it is on, and to which dtype.
            read: Called when a result is read.
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
        """A block is called; its own function would turn ``leaves`` into its results."""
        self.watch(leaves)
        self._calls.append(
            (function, [leaf.number if type(leaf) is Deferred else leaf for leaf in leaves])
        )

    def watch(self, leaves: Sequence[Tensor]) -> None:
        """What is read later must be what it is now."""
        self._versions += [(leaf, leaf._version) for leaf in leaves if type(leaf) is not Deferred]

    def results(self, kinds: Sequence[Any], strides: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """What that block returns."""
        block = len(self._given)
        found: list[Tensor] = [
            Deferred.make(self, block, number, kind, stride)
            for number, (kind, stride) in enumerate(zip(kinds, strides, strict=True))
        ]
        self._given.append([weakref.ref(one) for one in found])
        return found

    def is_last(self, leaf: Tensor, number: int) -> bool:
        """Whether this is a result of the last block that was called."""
        return self._values is None and self._given[-1][number]() is leaf

    def kept(self) -> bool:
        """Whether someone holds on to a result of a block before the last that was called."""
        return any(one() is not None for found in self._given[:-1] for one in found)

    def begin(self) -> None:
        """The graph runs.

        Raises:
            Unreadable: What it is given was changed in place since.
        """
        self._check()
        self.over = True
        self._calls.clear()
        self._versions.clear()

    def value(self, block: int, number: int) -> Tensor:
        """Return a result, for which the blocks run as they are if they have not.

        Raises:
            Unreadable: The graph has run, or a tensor was changed in place.
        """
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
    """A result of a block that has not run; shape, dtype and device are known."""

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
        """Return a tensor with content instead.

        Raises:
            Unreadable: There is none any more.
        """
        return self.deferral.value(self.block, self.number)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What is known is answered, anything else asks for the content."""
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*with_content(args), **with_content(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Below autograd it is too late: the gradient would be lost."""
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
        Unreadable: There is none any more.
    """
    if type(value) is Deferred:
        return value.content()
    if type(value) in (tuple, list):
        return type(value)([with_content(part) for part in value])
    if type(value) is dict:
        return {key: with_content(part) for key, part in value.items()}
    return value
