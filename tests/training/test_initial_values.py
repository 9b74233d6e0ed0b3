"""Initial values that are drawn on another device than the model is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import AffixTuning, ParallelAdapter, ProdialConfig, apply_methods
from prodial_kernels.training.start.drawing import DrawnOn
from support.models import build


def adapted(drawing: AbstractContextManager[object]) -> dict[str, Tensor]:
    model = build("mamba", num_hidden_layers=1)
    torch.manual_seed(5)
    with drawing:
        apply_methods(model, [ProdialConfig(r=2), ParallelAdapter(r=3), AffixTuning(2)])
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_they_are_those_of_the_other_device() -> None:
    # By this name it is another one, whose numbers are known.
    found, expected = adapted(DrawnOn(torch.device("cpu", 0))), adapted(nullcontext())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(values.std() > 0 for values in found.values() if values.numel() > 1) >= 4


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.zeros(3).uniform_(-1, 1),
        lambda: torch.randn(3),
        lambda: nn.init.kaiming_uniform_(torch.zeros(3, 2), a=2.0),
        lambda: nn.init.normal_(torch.zeros(3)),
        lambda: nn.Linear(2, 2),
    ],
)
def test_nothing_is_drawn_here(draw) -> None:
    with DrawnOn(torch.device("meta")), pytest.raises(NotImplementedError, match="no data"):
        draw()
