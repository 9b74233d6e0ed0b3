"""A small network with what real ones have: shared layers, tied weights, root-level layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * width, bias=bias)
        self.out_proj = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(torch.tanh(self.in_proj(self.norm(x))))


class Toy(nn.Module):
    """``shared`` is also ``blocks.1.twin``; ``head`` is tied to ``embedding``."""

    def __init__(self, width: int = 6, depth: int = 3, vocabulary: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, bias=i == 0) for i in range(depth))
        self.shared = nn.Linear(width, width)
        self.blocks[1].twin = self.shared
        self.conv1d = nn.Conv1d(width, width, 1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stem(self.embedding(ids))
        for block in self.blocks:
            x = block(x)
        x = self.blocks[1].twin(torch.tanh(self.shared(x)))
        return self.head(x)


def toy_ids() -> Tensor:
    return torch.arange(10).reshape(2, 5)
