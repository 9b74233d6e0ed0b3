"""Adapting mamba_ssm's mixers and undoing it: classes, copies, captured graphs, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from support.mixers.adapted_mamba_ssm import CONFIG, MIXERS, adapted, step, token_ids
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2, Model

pytestmark = pytest.mark.usefixtures("stand_in_kernels", "weight_is_not_read")


@pytest.mark.parametrize("undo", [merge_prodial, remove_prodial])
@pytest.mark.parametrize("mixer", MIXERS)
def test_undoing_restores_class_and_attributes(
    mixer: type[nn.Module], undo: Callable[[Model], Model]
) -> None:
    model = Model(mixer).double()
    before = set(vars(model.layers[0].mixer))
    logits = model(token_ids())
    apply_prodial(model, CONFIG)
    assert isinstance(model.layers[0].mixer, mixer)
    assert type(model.layers[0].mixer) is not mixer
    undo(model)
    assert type(model.layers[0].mixer) is mixer
    assert set(vars(model.layers[0].mixer)) == before
    torch.testing.assert_close(model(token_ids()), logits)


@pytest.mark.parametrize("undo", [merge_prodial, remove_prodial])
def test_decoding_graphs_captured_with_other_weights_are_dropped(
    undo: Callable[[Model], Model],
) -> None:
    model = Model(Mamba)
    model._decoding_cache = "a graph"
    apply_prodial(model, CONFIG)
    assert model._decoding_cache is None
    model._decoding_cache = "a graph"
    undo(model)
    assert model._decoding_cache is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("mixer", MIXERS)
def test_copies_are_independent(
    mixer: type[nn.Module], duplicate: Callable[[Model], Model]
) -> None:
    model = adapted(mixer)
    expected = step(model, token_ids())
    twin = duplicate(model)
    remove_prodial(model)
    for name, value in step(twin, token_ids()).items():
        assert torch.equal(value, expected[name]), name
    remove_prodial(twin)
    assert type(twin.layers[0].mixer) is mixer


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return sum(x @ self.out_proj.weight.t() for _ in range(2)) + self.in_proj(x)


class ReadsItsDevice(ReadsTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x.to(self.out_proj.weight.device)) + self.in_proj(x)


class RewrittenMamba(Mamba):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.in_proj.weight.t()


def test_unknown_mixers_that_would_bypass_an_adapter_are_refused() -> None:
    model = nn.Sequential(ReadsTheWeight())
    message = rf"0, a {__name__}\.ReadsTheWeight, reads out_proj\.weight in forward\(\) instead of"
    with pytest.raises(ValueError, match=message):
        apply_prodial(model, CONFIG)
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())
    apply_prodial(model, ProdialConfig(target_modules=("in_proj",)))
    apply_prodial(nn.Sequential(ReadsItsDevice()), CONFIG)
    with pytest.raises(ValueError, match=r"RewrittenMamba, reads in_proj\.weight in forward"):
        apply_prodial(nn.Sequential(RewrittenMamba(8)), CONFIG)


def test_mamba2_over_a_process_group_is_refused() -> None:
    model = Model(Mamba2, process_group=object())
    with pytest.raises(ValueError, match="tensor-parallel projectors cannot be adapted"):
        apply_prodial(model, CONFIG)
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())
