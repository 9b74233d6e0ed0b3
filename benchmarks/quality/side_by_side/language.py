"""A language task for runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.side_by_side import mamba1, mamba2
from benchmarks.quality.side_by_side.examples import Choices, Examples, choices_of, examples_of
from benchmarks.quality.side_by_side.stacked import EMBEDDINGS, HEAD, Weights
from benchmarks.quality.study.language import LanguageData

__all__ = ["Language", "language_of"]


@dataclass
class Language:
    """A :class:`~benchmarks.quality.side_by_side.learner.Learner` of text.

    Attributes:
        shape: Of the base.
        examples: To train on.
        choices: Of the splits that are scored.
        length: Tokens of a training example, with padding.
        dtype: Of products of Mamba-2's matrices; Mamba-1's are in fp32.
        fused: Whether Triton kernels compute what lies between Mamba-2's projectors.
    """

    shape: mamba1.Shape | mamba2.Shape
    examples: Examples
    choices: dict[str, Choices]
    length: int
    dtype: torch.dtype = torch.float32
    fused: bool = False
    tied: dict[str, str] = field(default_factory=lambda: {HEAD: EMBEDDINGS})

    def __post_init__(self) -> None:
        self.count = len(self.examples.ids)
        self._middle: Callable[..., Tensor] = mamba2.between
        if self.fused:
            from benchmarks.quality.side_by_side.fused import between as kernels

            self._middle = kernels

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.examples.ids.device

    def to(self, device: torch.device) -> Language:
        """The same on a device."""
        choices = {split: made.to(device) for split, made in self.choices.items()}
        return replace(self, examples=self.examples.to(device), choices=choices)

    def _logits(self, weights: Weights, ids: Tensor, positions: Tensor) -> Tensor:
        if isinstance(self.shape, mamba1.Shape):
            return mamba1.forward(self.shape, weights, ids, positions)
        return mamba2.forward(self.shape, weights, ids, positions, self.dtype, self._middle)

    def losses(self, weights: Weights, chosen: Tensor) -> Tensor:
        """Mean nats a token of each run's answers, [runs], of examples ``chosen`` [runs, batch]."""
        part = self.examples
        ids, positions, targets = (t[chosen] for t in (part.ids, part.positions, part.targets))
        logits = self._logits(weights, ids, positions)
        nats = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
        return nats.view(len(chosen), -1).sum(1) / (targets >= 0).sum((1, 2))

    def accuracy(self, weights: Weights, runs: int, split: str) -> list[float]:
        """Of each run: the share of examples whose right choice is the likeliest."""
        choices = self.choices[split]
        scores = torch.full((runs, *choices.bytes.shape), -math.inf, device=self.device)
        for ids, positions, targets, source, example, choice in choices.batches:
            logits = self._logits(weights, ids.expand(runs, -1, -1), positions.expand(runs, -1, -1))
            places, words = logits.shape[2:]
            place = source[:, None] * places + torch.arange(places, device=self.device)
            found = logits.flatten(1)[:, place * words + targets.clamp(min=0)]
            nats = logits.logsumexp(3).flatten(1)[:, place] - found
            total = torch.where(targets >= 0, nats, 0.0).sum(2)
            scores[:, example, choice] = -total / choices.bytes[example, choice]
        right = scores.argmax(2) == choices.answers
        return (right.sum(1).double() / right.shape[1]).tolist()


def language_of(
    shape: mamba1.Shape | mamba2.Shape,
    data: LanguageData,
    limit: int,
    tokens_a_batch: int,
    *,
    splits: tuple[str, ...] = ("validation", "test"),
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
) -> Language:
    """A task as tensors.

    Args:
        shape: Of the base.
        data: The task.
        limit: Most examples of a split that are scored; 0 for all.
        tokens_a_batch: Most tokens of a batch that is scored, of each run.
        splits: That are scored.
        dtype: Of products of Mamba-2's matrices; Mamba-1's are in fp32.
        fused: Whether Triton kernels compute what lies between Mamba-2's projectors.
    """
    choices = {split: choices_of(data, split, limit, tokens_a_batch) for split in splits}
    return Language(shape, examples_of(data), choices, data.length, dtype, fused)
