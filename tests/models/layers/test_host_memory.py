"""Inputs of blocks that wait in the host's memory: what is here when, and buffers used again."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.host_memory import HostStore, Sent
from prodial_kernels.models.layers.recompute import OFFLOAD, apply_levels
from support.mixers.adapted_mamba_ssm import MIXERS
from support.mixers.mamba_ssm_stand_ins import Model
from support.models import build, randomise_adapters, token_ids


def test_one_is_on_its_way_and_comes_back_with_the_one_before() -> None:
    store = HostStore()
    tensors = [torch.full((3,), float(i)) for i in range(4)]
    sent = [store.send(tensor.clone()) for tensor in tensors]
    assert [each.here is None for each in sent] == [True, True, True, False]
    for index in (3, 2, 1, 0):
        assert torch.equal(store.bring(sent[index]), tensors[index])
        here = [each.here is not None for each in sent]
        # The next one is on its way, and no more.
        assert here[: max(0, index - 1)] == [False] * max(0, index - 1)
        assert here[max(0, index - 1)]
        sent[index].here = None


def test_buffers_are_used_again() -> None:
    store = HostStore()
    first = [store.send(torch.zeros(5)) for _ in range(3)]
    places = {each.buffer.data_ptr() for each in first}
    assert len(places) == 3
    del first
    store.settle()
    again = [store.send(torch.ones(5)) for _ in range(3)]
    assert {each.buffer.data_ptr() for each in again} == places
    other = store.send(torch.ones(6))
    assert other.buffer.shape == (6,)


def test_what_nobody_asks_for_is_not_brought() -> None:
    store = HostStore()
    kept = store.send(torch.zeros(2))
    lost = store.send(torch.ones(2))
    last = store.send(torch.full((2,), 2.0))
    del lost
    gc.collect()
    assert float(store.bring(last)[0]) == 2
    assert kept.here is not None
    assert float(store.bring(kept)[0]) == 0


def test_a_copy_of_a_model_has_an_empty_store() -> None:
    store = HostStore()
    sent = store.send(torch.zeros(2))
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert other is not store
        assert not other._sent
    assert sent.store is store


def adapted(name: str) -> Any:
    model = build(name)
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    return model


def step(model: Any, seed: int) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    ids = token_ids(seed=seed)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mamba", "nemotron_h", "falcon_h1"])
def test_steps_are_the_same_and_take_no_new_buffers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(name)
    expected = [step(model, seed) for seed in (1, 2)]
    made: list[Sent] = []
    original = HostStore.send

    def watched(self: HostStore, tensor: torch.Tensor) -> Sent:
        made.append(original(self, tensor))
        return made[-1]

    monkeypatch.setattr(HostStore, "send", watched)
    layers = len(model.get_submodule("backbone" if name == "mamba" else "model").layers)
    with apply_levels(model, [OFFLOAD] * layers):
        places = []
        for seed, wanted in zip((1, 2), expected, strict=True):
            found = step(model, seed)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
            places.append({each.buffer.data_ptr() for each in made})
            assert len(made) == layers
            made.clear()
        assert places[0] == places[1]
        # Two batches whose backward comes afterwards.
        losses = []
        for seed in (1, 2):
            ids = token_ids(seed=seed)
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
        model.zero_grad(set_to_none=True)
        (losses[0] + losses[1]).backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                both = expected[0][key] + expected[1][key]
                torch.testing.assert_close(parameter.grad, both, rtol=1e-4, atol=1e-6)


def test_blocks_of_two_inputs_are_refused() -> None:
    model = Model(MIXERS[0])
    model.layers[0].fused_add_norm = True
    with pytest.raises(ValueError, match="takes two inputs"):
        apply_levels(model, [OFFLOAD] * len(model.layers))
