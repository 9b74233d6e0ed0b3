"""A vision task for runs side by side."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.bases.pretrain import as_input
from benchmarks.quality.side_by_side.stacked import Weights
from benchmarks.quality.side_by_side.vim import Shape, forward
from benchmarks.quality.study.vision import VisionData

__all__ = ["Vision", "vision_of"]

_IMAGES = 4096  # of all runs of a stack, in a batch that is scored


@dataclass
class Vision:
    """A :class:`~benchmarks.quality.side_by_side.learner.Learner` of images.

    Attributes:
        shape: Of the base.
        splits: Of each split: uint8 images [n, c, h, w] and classes [n].
    """

    shape: Shape
    splits: dict[str, tuple[Tensor, Tensor]]
    length: int = 1
    tied: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.count = len(self.splits["train"][1])

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.splits["train"][1].device

    def to(self, device: torch.device) -> Vision:
        """The same on a device."""
        moved = {name: (x.to(device), y.to(device)) for name, (x, y) in self.splits.items()}
        return replace(self, splits=moved)

    def losses(self, weights: Weights, chosen: Tensor) -> Tensor:
        """Mean nats an image of each run, [runs], of the examples ``chosen`` [runs, batch]."""
        images, labels = (part[chosen] for part in self.splits["train"])
        shown = as_input(images.flatten(0, 1)).unflatten(0, chosen.shape)
        logits = forward(self.shape, weights, shown)
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return nats.view(chosen.shape).mean(1)

    def accuracy(self, weights: Weights, runs: int, split: str) -> list[float]:
        """Of each run: the share of a split's images that are given their class."""
        images, labels = self.splits[split]
        right = torch.zeros(runs, dtype=torch.long, device=self.device)
        size = max(1, _IMAGES // runs)
        for i in range(0, len(labels), size):
            shown = as_input(images[i : i + size]).expand(runs, -1, -1, -1, -1)
            guess = forward(self.shape, weights, shown).argmax(-1)
            right += (guess == labels[i : i + size]).sum(1)
        return (right.double() / max(1, len(labels))).tolist()


def vision_of(shape: Shape, data: VisionData, limit: int) -> Vision:
    """A task's images; ``limit`` is how many of validation and test are scored (0: all)."""
    splits = {}
    for name, (images, labels) in data.splits.items():
        most = len(labels) if name == "train" or not limit else limit
        splits[name] = images[:most], labels[:most]
    return Vision(shape, splits)
