"""What a captured model answers from memory: as it would by itself, also after it has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels.captured.answers.walks import Walks
from support.captured.models import adapted
from support.captured.steps import release, step, warmed
from support.models import build, token_ids


def asked(model: Any) -> tuple[Any, ...]:
    return (
        [*map(id, model.parameters())],
        model.num_parameters(),
        model.num_parameters(exclude_embeddings=True),
        model.num_parameters(only_trainable=True),
        [module.training for module in model.modules()],
    )


def own(model: Any) -> tuple[Any, ...]:
    cls = type(model)
    return (
        [*map(id, cls.parameters(model))],
        cls.num_parameters(model),
        cls.num_parameters(model, exclude_embeddings=True),
        cls.num_parameters(model, only_trainable=True),
        [module.training for module in model.modules()],
    )


@pytest.fixture
def model() -> Iterator[Any]:
    model = adapted()
    walks = Walks(model)
    assert {"parameters", "train", "num_parameters"} <= vars(model).keys()
    yield model
    walks.remove()
    assert vars(model).keys().isdisjoint({"parameters", "train", "num_parameters"})


def test_the_same_answers(model: Any) -> None:
    assert asked(model) == own(model)
    assert asked(model) == own(model)
    assert len([*model.parameters(recurse=False)]) == 0


def test_no_walk_where_nothing_has_changed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = own(model)
    asked(model)

    def walk(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was walked over")

    monkeypatch.setattr(nn.Module, "named_modules", walk)
    monkeypatch.setattr(nn.Module, "children", walk)
    model.train()
    model.zero_grad()
    assert [*map(id, model.parameters())] == expected[0]
    assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == expected[1:3]


def test_changes_are_noticed(model: Any) -> None:
    asked(model)
    model.extra = nn.Linear(3, 5)
    assert asked(model) == own(model)
    mixer = model.backbone.layers[0].mixer
    mixer.D = nn.Parameter(torch.zeros(7))
    assert asked(model) == own(model)
    mixer.D.data = torch.zeros(9)
    assert asked(model) == own(model)
    del model.extra
    model.backbone.layers[1] = nn.Identity()
    assert asked(model) == own(model)


def test_modes(model: Any) -> None:
    inner = model.backbone.layers[0].mixer
    inner.eval()
    assert model.train() is model
    assert inner.training
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    model.train(mode=True)
    assert all(module.training for module in model.modules())
    with pytest.raises(TypeError):
        model.train(True, True)


def test_gradients_are_dropped(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_methods_of_ones_own_are_kept() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[0].eval()
            return self

        def parameters(self, recurse: bool = True) -> Any:
            return iter(())

    model = Frozen(nn.Dropout(), nn.Linear(2, 2))
    walks = Walks(model)
    model.train()
    assert not model[0].training
    assert [*model.parameters()] == []
    walks.remove()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own(model: Any, copied: Any) -> None:
    other = copied(model)
    assert asked(other) == own(other)
    assert {*map(id, other.parameters())}.isdisjoint(map(id, model.parameters()))
    other.eval()
    assert model.training
    assert not any(module.training for module in other.modules())


def test_while_captured() -> None:
    model: Any = adapted()
    warmed(model)
    step(model, token_ids())
    assert "parameters" in vars(model)
    assert asked(model) == own(model)
    release(model)
    assert "parameters" not in vars(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_of_pefts() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["in_proj"])
    model: Any = peft.get_peft_model(build("mamba2"), config)
    expected = model.num_parameters(exclude_embeddings=True)
    walks = Walks(model)
    assert "num_parameters" in vars(model.base_model.model)
    assert model.num_parameters(exclude_embeddings=True) == expected
    assert [*map(id, model.parameters())] == [*map(id, type(model).parameters(model))]
    walks.remove()
