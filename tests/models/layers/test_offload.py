"""Blocks that visit a device one at a time. The device is a CPU that counts its visitors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.offload import blocks_on_demand
from prodial_kernels.training.merging import logits_of
from support.tiny_model import tiny_mamba2

CPU = torch.device("cpu")


def test_one_block_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mamba2().eval()
    ids = torch.randint(0, 257, (1, 20))
    expected = logits_of(model, ids)
    blocks = blocks_of(model)
    moves: list[tuple[int, Any]] = []
    move = nn.Module.to

    def noting(module: nn.Module, device: torch.device) -> nn.Module:
        if module in blocks:
            moves.append((blocks.index(module), device))
            return module
        return move(module, CPU)

    monkeypatch.setattr(nn.Module, "to", noting)
    device = torch.device("cpu", 0)
    with blocks_on_demand(model, device):
        assert torch.equal(logits_of(model, ids), expected)
    assert moves == [(0, device), (0, CPU), (1, device), (1, CPU)]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_everything_is_undone_after_an_error() -> None:
    model = tiny_mamba2().eval()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = embedding.weight

    def fail() -> None:
        with blocks_on_demand(model, CPU):
            assert all(block._forward_hooks for block in blocks_of(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert head.weight is embedding.weight
    assert not any(block._forward_hooks for block in blocks_of(model))
