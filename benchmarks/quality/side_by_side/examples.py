"""A language task on the device: all training examples, and all choices to score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.study.language import LanguageData

__all__ = ["Choices", "Examples", "choices_of", "examples_of"]


@dataclass
class Examples:
    """Training examples, padded.

    Attributes:
        ids: [n, length].
        positions: [n, k]: where the model is asked for a token of the answer.
        targets: [n, k]: the token, or -100 behind the end of an answer.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Examples:
        """The same on a device."""
        return Examples(*(t.to(device) for t in (self.ids, self.positions, self.targets)))


@dataclass
class Choices:
    """All choices of a split's examples, those of like length together.

    Attributes:
        batches: Of each batch: ids [s, length] and positions [s, k] of its different inputs; and
            of each choice its targets [c, k], which input, example and choice [c] it is. Choices
            that differ in their last token alone, which is never an input, share one.
        bytes: [examples, choices], by which a choice's nats are divided.
        answers: [examples], the right choices.
    """

    batches: list[tuple[Tensor, ...]]
    bytes: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> Choices:
        """The same on a device."""
        batches = [tuple(part.to(device) for part in batch) for batch in self.batches]
        return Choices(batches, self.bytes.to(device), self.answers.to(device))


def _positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """From labels at the places of the answers' tokens, [n, length], to those that predict them."""
    count = max(1, int((labels >= 0).sum(1).max()))
    # The answer's tokens first, in their order.
    order = torch.argsort((labels < 0).int(), dim=1, stable=True)[:, :count]
    return (order - 1).clamp(min=0), labels.gather(1, order)


def _different(ids: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and positions without repeats, and of each row which of them is its own."""
    length = ids.shape[1]
    last = ((labels >= 0) * torch.arange(1, length + 1, device=ids.device)).argmax(1)
    inputs = ids.scatter(1, last[:, None], 0)
    rows, source = torch.cat([inputs, positions], 1).unique(dim=0, return_inverse=True)
    return rows[:, :length].contiguous(), rows[:, length:].contiguous(), source


def examples_of(data: LanguageData) -> Examples:
    """The training split; positions are trimmed to the longest answer."""
    ids, labels = data.batch(range(len(data)))
    positions, targets = _positions(labels)
    return Examples(ids, positions, targets)


def choices_of(data: LanguageData, split: str, limit: int, tokens_a_batch: int) -> Choices:
    """All choices of a split's (first ``limit``) examples.

    Args:
        data: The task.
        split: Its name.
        limit: 0 for all.
        tokens_a_batch: Most tokens, with padding, of a batch.
    """
    examples = data.task.splits[split][: limit or None]
    batches: list[tuple[Tensor, ...]] = []
    for rows, ids, labels in data.choice_batches(examples, tokens_a_batch):
        positions, targets = _positions(labels)
        which = torch.tensor(rows, device=data.device)
        ids, positions, source = _different(ids, labels, positions)
        batches.append((ids, positions, targets, source, which[:, 0], which[:, 1]))
    most = max(len(example.choices) for example in examples)
    sizes = torch.ones(len(examples), most)
    for i, example in enumerate(examples):
        for j, choice in enumerate(example.choices):
            sizes[i, j] = len(choice.encode()) if data.task.per_byte else 1
    answers = torch.tensor([example.answer for example in examples])
    return Choices(batches, sizes.to(data.device), answers.to(data.device))
