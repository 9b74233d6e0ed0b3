"""What a stack of runs learns: a task on a device, for models with a dimension of runs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.quality.side_by_side.stacked import Weights

__all__ = ["Learner"]


class Learner(Protocol):
    """A task for one base.

    Attributes:
        count: Examples to train on.
        length: Tokens of one, with padding; 1 for an image.
        tied: Name of a weight that the plain model lacks -> the one that it shares.
    """

    count: int
    length: int
    tied: dict[str, str]

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def to(self, device: torch.device) -> Learner:
        """The same on a device."""

    def losses(self, weights: Weights, chosen: Tensor) -> Tensor:
        """Mean nats of each run, [runs], of the examples ``chosen`` [runs, batch]."""

    def accuracy(self, weights: Weights, runs: int, split: str) -> list[float]:
        """Of each run: the share of a split's examples that it gets right."""
