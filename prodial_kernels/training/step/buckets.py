"""Few shapes for many batches: lengths are filled up to buckets, batches to their full size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prodial_kernels.training.data.batches import IGNORED, Batch

MAX_BUCKETS = 8
"""Lengths in all, each a graph of its own; the shortest is a tenth of the longest."""

_MULTIPLE = 8


class Shape(NamedTuple):
    """Micro-batches, sequences in one, tokens in a sequence."""

    parts: int
    batch: int
    length: int


class Buckets:
    """The shapes that steps of one run are given.

    Lengths fall by √2, so that filling up adds a sixth on average. Sequences are filled up on the
    right and have no label there, so that nothing reaches the tokens before and nothing is learned;
    missing sequences of an epoch's last batch are filled up likewise.
    """

    def __init__(self, batch_size: int, seq_len: int) -> None:
        """Make the buckets of batches of at most ``[batch_size, seq_len]``."""
        self.batch_size = batch_size
        lengths = {_rounded(seq_len * 2 ** (-k / 2)) for k in range(MAX_BUCKETS)}
        # Batches of windows have this very length.
        self.lengths = sorted({seq_len, *(n for n in lengths if n < seq_len), _rounded(seq_len)})

    def shape_of(self, parts: Sequence[Batch]) -> Shape:
        """Return the smallest shape that holds every micro-batch of a step.

        Raises:
            ValueError: None does.
        """
        longest = max(part.input_ids.shape[1] for part in parts)
        widest = max(part.input_ids.shape[0] for part in parts)
        fitting = [length for length in self.lengths if length >= longest]
        if not fitting or widest > self.batch_size:
            raise ValueError(
                f"batches must be at most [{self.batch_size}, {self.lengths[-1]}], got one of "
                f"[{widest}, {longest}]"
            )
        return Shape(len(parts), self.batch_size, fitting[0])


def fill(parts: Sequence[Batch], held: Batch) -> None:
    """Write micro-batches into tensors ``[parts, batch, length]`` that may be larger."""
    for target, name in zip(held, Batch._fields, strict=True):
        if target is None:
            continue
        target.fill_(IGNORED if name == "labels" else 0)
        for place, part in enumerate(parts):
            source = getattr(part, name)
            target[place, : source.shape[0], : source.shape[1]] = source


def buffers(shape: Shape, like: Batch, device: torch.device | str) -> Batch:
    """Return what :func:`fill` writes to; on the CPU in pinned memory where there is CUDA."""
    pinned = torch.device(device).type == "cpu" and torch.cuda.is_available()

    def make(tensor: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=tensor.dtype, device=device, pin_memory=pinned)

    seq_idx = None if like.seq_idx is None else make(like.seq_idx)
    return Batch(make(like.input_ids), make(like.labels), seq_idx)


def _rounded(length: float) -> int:
    return max(_MULTIPLE, math.ceil(length / _MULTIPLE) * _MULTIPLE)
