"""What a training batch is, and the order of an epoch: both a pure function of seed and step."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
        position_ids: int64 ``[batch, length]``: where in its document a token stands, for models
            with attention, which keep documents apart by that; None for any other.
    """

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def apart(self) -> dict[str, Tensor]:
        """What the model is given beside the ids to keep documents apart, by its names."""
        given = {"seq_idx": self.seq_idx, "position_ids": self.position_ids}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sizes of training batches, and the seed of their order.

    Attributes:
        seq_len: Tokens in a window, or the most in a padded sequence; at least 2.
        batch_size: Sequences in a batch.
        seed: Decides the order of every epoch.

    Raises:
        ValueError: A size is too small.
    """

    seq_len: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes({"seq_len": (self.seq_len, 2), "batch_size": (self.batch_size, 1)})


class TrainingBatches(ABC):
    """Batches addressed by step, so that a resumed run continues without replaying anything.

    Attributes:
        sizes: Of a batch, with the seed.
        steps_per_epoch: Steps after which every sequence has been used at least once.
        n_tokens: Tokens of one epoch, without padding.
        notes: What became of the examples: how they are ended, and how many were cut; a line each.
        n_truncated: Sequences that lost tokens, because they were longer than a sequence may be.
    """

    def __init__(
        self, sizes: BatchSizes, *, sequences: int, tokens: int, notes: Sequence[str]
    ) -> None:
        """Describe batches of ``sequences`` sequences with ``tokens`` tokens in all."""
        self.sizes = sizes
        self.steps_per_epoch = -(-sequences // sizes.batch_size)
        self.n_tokens = tokens
        self.notes = tuple(notes)
        self.n_truncated = 0

    @cached_property
    def fingerprint(self) -> str:
        """Hash of data, sizes and seed: equal fingerprints mean equal batches at every step."""
        kind, options, tensors = self._identity()
        sizes = self.sizes
        digest = hashlib.sha256(
            repr((kind, sizes.seq_len, sizes.batch_size, sizes.seed, *options)).encode()
        )
        for tensor in tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, from 0 without bound; ValueError for a negative one."""
        check_sizes({"step": (step, 0)})
        return self._batch(step)

    @abstractmethod
    def _batch(self, step: int) -> Batch: ...

    @abstractmethod
    def _identity(self) -> tuple[str, tuple[object, ...], tuple[Tensor, ...]]:
        """What the fingerprint is of: the kind of batches, options beside the sizes, the data."""


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


def check_sizes(sizes: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError for the first of ``sizes``, name to (value, minimum), that is too small."""
    for name, (value, minimum) in sizes.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
