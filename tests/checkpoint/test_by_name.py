"""Saving and loading one of several adapters of a model by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    active_adapter,
    add_adapter,
    apply_prodial,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
    using_adapter,
)
from prodial_kernels.checkpoint import AdapterError, read_adapter
from support.models import randomise_adapters
from support.saved_adapters import CONFIG, Model, trained

FIRST = ProdialConfig(r=4, n_blocks=4)
SECOND = ProdialConfig(r=2, target_modules=["in_proj"], train_scale=False)
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def two() -> nn.Module:
    model = Model().eval()
    apply_prodial(model, FIRST, "first")
    add_adapter(model, "second", SECOND)
    for seed, name in enumerate(list_adapters(model)):
        with using_adapter(model, name):
            randomise_adapters(model, seed)
    return model


def output(model: nn.Module, adapter: str) -> torch.Tensor:
    with using_adapter(model, adapter), torch.no_grad():
        return model.eval()(X)


def test_each_is_written_as_if_it_were_alone(tmp_path: Path) -> None:
    model = two()
    for name in ("first", "second"):
        save_adapter(model, tmp_path / name, adapter=name)
    save_adapter(model, tmp_path / "active")
    assert read_adapter(tmp_path / "active").tensors.keys() == (
        read_adapter(tmp_path / "first").tensors.keys()
    )
    assert read_adapter(tmp_path / "second").config == SECOND
    assert active_adapter(model) == "first"
    for name in ("first", "second"):
        single = Model().eval()
        load_adapter(single, tmp_path / name)
        assert (active_adapter(single), len(list_adapters(single))) == ("default", 1)
        assert torch.equal(single(X), output(model, name))
    # Both into one model, in the other order, under other names.
    again = Model().eval()
    load_adapter(again, tmp_path / "second", adapter="two")
    report = load_adapter(again, tmp_path / "first", adapter="one")
    assert active_adapter(again) == "two"
    assert report.trainable == sum(p.numel() for p in again.parameters() if p.requires_grad)
    assert torch.equal(output(again, "two"), output(model, "second"))
    assert torch.equal(output(again, "one"), output(model, "first"))


def test_loading_over_one_that_is_there(tmp_path: Path) -> None:
    model = two()
    save_adapter(model, tmp_path, adapter="second")
    first, second = output(model, "first"), output(model, "second")
    with using_adapter(model, "second"):
        randomise_adapters(model, seed=9)
    assert not torch.equal(output(model, "second"), second)
    load_adapter(model, tmp_path, adapter="second")
    assert torch.equal(output(model, "second"), second)
    assert torch.equal(output(model, "first"), first)
    with pytest.raises(AdapterError, match="another configuration"):
        load_adapter(model, tmp_path, adapter="first")
    with pytest.raises(AdapterError, match="another configuration"):
        load_adapter(model, tmp_path)


def test_another_base_is_refused_for_a_second_adapter_too(tmp_path: Path) -> None:
    model = two()
    save_adapter(model, tmp_path, adapter="second")
    other = Model(seed=5).eval()
    apply_prodial(other, FIRST)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(AdapterError, match="trained on other weights"):
        load_adapter(other, tmp_path, adapter="second")
    assert list_adapters(other) == {"default": FIRST}
    assert before.keys() == other.state_dict().keys()


def test_what_all_adapters_would_share_is_refused(tmp_path: Path) -> None:
    beside = trained(CONFIG)
    save_adapter(beside, tmp_path / "head")
    model = two()
    with pytest.raises(AdapterError, match=r"holds head\.\d.*other adapters would run on it"):
        load_adapter(model, tmp_path / "head", adapter="third")
    # A parameter that was thawed by hand is part of what is saved.
    model.layers[0].out_proj.base_layer.bias.requires_grad_()
    save_adapter(model, tmp_path / "bias", adapter="second")
    load_adapter(model, tmp_path / "bias", adapter="second")
    with torch.no_grad():
        model.layers[0].out_proj.base_layer.bias.add_(1)
    with pytest.raises(AdapterError, match=r"holds layers\.0\.out_proj\.bias"):
        load_adapter(model, tmp_path / "bias", adapter="second")


def test_names_that_are_not_there(tmp_path: Path) -> None:
    model = two()
    with pytest.raises(AdapterError, match=r"no adapter 'third'; it has \['first', 'second'\]"):
        save_adapter(model, tmp_path, adapter="third")
    save_adapter(model, tmp_path, adapter="second")
    with pytest.raises(AdapterError, match="letters, digits"):
        load_adapter(model, tmp_path, adapter="a.b")
    with pytest.raises(AdapterError, match="letters, digits"):
        load_adapter(Model(), tmp_path, adapter="a.b")
    assert list_adapters(model).keys() == {"first", "second"}


def test_a_failed_load_deletes_what_it_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two()
    save_adapter(model, tmp_path, adapter="second")
    delete_adapter(model, "second")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("prodial_kernels.checkpoint.adapter._copy_into", fail)
    with pytest.raises(MemoryError):
        load_adapter(model, tmp_path, adapter="second")
    assert list_adapters(model) == {"first": FIRST}
    set_adapter(model, "first")
