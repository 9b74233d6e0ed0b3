"""Detecting that a cached W' no longer matches the tensors it was formed from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Marks = tuple[object, ...]


def marks_of(tensors: Iterable[Tensor | None], *settings: object) -> Marks:
    """Return what changes when any of the tensors, or of the settings, is replaced or changed.

    Seen is every change in place that PyTorch counts (``load_state_dict``, ``copy_`` and other
    methods under ``torch.no_grad``, optimisers), another tensor, and other memory
    (``parameter.data = ...``). Not seen is what nothing counts: a change in place of
    ``parameter.data`` or of a NumPy view, a step of an optimiser with ``fused=True``, and any
    change that a compiled call would have to look for. Unmerge and merge again after those.
    """
    marks = list(settings)
    for tensor in tensors:
        if tensor is not None:
            # Tensors made in inference mode count nothing: torch says so by an error.
            version = -1 if tensor.is_inference() else tensor._version
            marks += (id(tensor), _address(tensor), version)
    return tuple(marks)


class Merged(Protocol):
    """A layer that may hold a cached W'."""

    @property
    def merged(self) -> bool:
        """Whether it does."""

    def renew_merged(self) -> None:
        """Form it anew if one of its tensors has changed."""


def merge_again(layer: Merged, incompatible_keys: object = None) -> None:
    """Renew the merged weight, if there is one, now: a compiled call would not look."""
    if layer.merged:
        layer.renew_merged()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # A tensor without memory of its own, such as a sharded one.
        return 0
