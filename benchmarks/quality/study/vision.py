"""Vision tasks for a model: batches of images and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.bases.pretrain import as_input
from benchmarks.quality.tasks.task import ImageTask

__all__ = ["VisionData"]


@dataclass
class VisionData:
    """A task's images on a device; ``splits`` has uint8 images and classes of each."""

    task: ImageTask
    device: torch.device

    def __post_init__(self) -> None:
        self.splits = {
            split: (
                torch.from_numpy(images).to(self.device),
                torch.from_numpy(labels).to(self.device),
            )
            for split, (images, labels) in self.task.splits.items()
        }
        self.length = 1

    def __len__(self) -> int:
        return len(self.splits["train"][1])

    def batch(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [b, 3, h, w] in [-1, 1] and classes [b]."""
        images, labels = self.splits["train"]
        chosen = torch.tensor(index, device=self.device)
        return as_input(images[chosen]), labels[chosen]

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean nats an image."""
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels)

    @torch.no_grad()
    def accuracy(self, model: Any, split: str, limit: int = 0) -> float:
        """Share of a split's (first ``limit``) images that are given their class."""
        images, labels = (part[: limit or None] for part in self.splits[split])
        images_a_batch = 256 if self.device.type == "cuda" else 32
        right = 0
        for i in range(0, len(labels), images_a_batch):
            guess = model(as_input(images[i : i + images_a_batch])).argmax(-1)
            right += int((guess == labels[i : i + images_a_batch]).sum())
        return right / max(1, len(labels))
