"""What a training batch is, and the order of an epoch: both a pure function of seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""The label that cross-entropy leaves out."""


class Batch(NamedTuple):
    """One training batch, on the CPU.

    Attributes:
        input_ids: int64 ``[batch, length]``.
        labels: int64 ``[batch, length]``: the input ids, or :data:`IGNORED` where nothing is
            learned. They are **not** shifted: causal language models of transformers shift.
        seq_idx: int32 ``[batch, length]``: which document of its row a token belongs to, for models
            that reset their state where it changes; None where rows are one sequence each.
    """

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor | None = None


class TrainingBatches(Protocol):
    """Batches addressed by step, so that a resumed run continues without replaying anything.

    Attributes:
        steps_per_epoch: Steps after which every sequence has been used at least once.
        n_tokens: Tokens of one epoch, without padding.
        notes: What became of the examples: how they are ended, and how many were cut; a line each.
        n_truncated: Sequences that lost tokens, because they were longer than a sequence may be.
    """

    steps_per_epoch: int
    n_tokens: int
    notes: Sequence[str]
    n_truncated: int

    @property
    def fingerprint(self) -> str:
        """Hash of data, sizes and seed: equal fingerprints mean equal batches at every step."""

    def batch(self, step: int) -> Batch:
        """Return the batch of a step (from 0, without bound: epochs follow on each other)."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for what the device is at."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the random generator of one epoch, independent of all other epochs' ones."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    # torch.Generator takes seeds of 63 bits.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class EpochOrder:
    """Indices in a new random order every epoch, addressed by how many came before.

    The order of an epoch follows from ``(seed, epoch)``; the last one used is kept.
    """

    def __init__(self, n: int, seed: int) -> None:
        """Order the indices below ``n``."""
        self._n = n
        self._seed = seed
        self._last: tuple[int, list[int]] = (-1, [])

    def index(self, sample: int) -> int:
        """Return the index of sample number ``sample`` (from 0) of the run."""
        epoch, place = divmod(sample, self._n)
        if self._last[0] != epoch:
            order = torch.randperm(self._n, generator=epoch_generator(self._seed, epoch))
            self._last = (epoch, order.tolist())
        return self._last[1][place]


def fingerprint(parts: tuple[object, ...], *tensors: Tensor) -> str:
    """Hash settings and tensor contents."""
    digest = hashlib.sha256(repr(parts).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def check_sizes(sizes: dict[str, tuple[int, int]]) -> None:
    """Raise where a value is under its minimum.

    Args:
        sizes: Name to (value, minimum).

    Raises:
        ValueError: Names the first value that is too small.
    """
    for name, (value, minimum) in sizes.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
