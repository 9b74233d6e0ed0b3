"""Fused norms and levels go onto a model together, and come off in the order that restores it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers import recompute
from prodial_kernels.models.layers.fused_norms import is_fused
from prodial_kernels.models.layers.recompute import CHECKPOINT, NORM, prepare_blocks
from support.models import build

CPU = torch.device("cpu")


def adapted() -> nn.Module:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2))
    return model


def fused(model: nn.Module) -> int:
    return sum(map(is_fused, model.modules()))


def test_both_are_applied_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "KERNEL_ON", ("cpu",))
    model, said = adapted(), []
    before = [type(module) for module in model.modules()]
    applied = prepare_blocks(model, [NORM, CHECKPOINT], device=CPU, say=said.append)
    assert said == [f"norms: {fused(model)} run as one kernel each"]
    applied.remove()
    assert [type(module) for module in model.modules()] == before
    assert not fused(model)


def test_where_there_is_no_kernel_norms_stay_as_they_are() -> None:
    model, said = adapted(), []
    prepare_blocks(model, [CHECKPOINT] * 2, device=CPU, say=said.append)
    assert not fused(model)
    assert not said


def test_without_levels_a_list_of_blocks_is_not_needed() -> None:
    prepare_blocks(nn.Linear(2, 2), None, device=CPU).remove()
