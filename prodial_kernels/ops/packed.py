"""A frozen weight that is stored in another format and never kept dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Unpack = Callable[[tuple[Tensor, ...], torch.dtype], Tensor]
"""(packed tensors, dtype) -> a new dense weight [N, K], by nothing but them and constants."""


class PackedWeight:
    """A frozen weight in a storage format: dequantised for a product, dropped after it."""

    __slots__ = ("tensors", "unpack", "versions")

    def __init__(self, tensors: tuple[Tensor, ...], unpack: Unpack) -> None:
        """Hold aliases of the stored tensors; they are what a backward pass finds again."""
        self.tensors = tensors
        self.unpack = unpack
        self.versions = _versions(tensors)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return a new W [N, K].

        Raises:
            RuntimeError: As :meth:`stored`.
        """
        return self.unpack(self.stored(), dtype)

    def stored(self) -> tuple[Tensor, ...]:
        """Return the stored tensors.

        Raises:
            RuntimeError: One was changed in place since this object was made, which autograd
                refuses of the tensors that it keeps itself.
        """
        if _versions(self.tensors) != self.versions:
            raise RuntimeError(
                "a quantised weight was modified in place between forward and backward; replace "
                "its tensors (load_state_dict does) or run forward again"
            )
        return self.tensors


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    if torch.compiler.is_compiling():
        # A graph takes the stored tensors as it finds them; torch.compile cannot ask.
        return []
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
