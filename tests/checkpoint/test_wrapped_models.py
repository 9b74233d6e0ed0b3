"""Models inside wrappers: plain names where the wrapper holds the model whole, else a refusal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from prodial_kernels import (
    ProdialLinear,
    apply_prodial,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError, read_adapter
from prodial_kernels.models.adapt.inject import get_prodial_config
from support.saved_adapters import CONFIG, Model, state, trained


@pytest.fixture
def one_process() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with warnings.catch_warnings():
        # What torch says of its own collectives.
        warnings.simplefilter("ignore")
        yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap", [compiled, data_parallel, in_ddp, lambda model: compiled(in_ddp(model))]
)
def test_a_wrapper_that_holds_the_model_whole(wrap, tmp_path: Path) -> None:
    model = trained(CONFIG)
    wrapped = wrap(model)
    assert get_prodial_config(wrapped) == CONFIG
    save_adapter(wrapped, tmp_path / "wrapped")
    save_adapter(model, tmp_path / "plain")
    tensors = [read_adapter(tmp_path / name).tensors for name in ("wrapped", "plain")]
    assert tensors[0].keys() == tensors[1].keys()
    again = Model()
    load_adapter(again, tmp_path / "wrapped")
    assert state(again) == state(model)
    other = trained(CONFIG, seed=5)
    load_adapter(wrap(other), tmp_path / "wrapped")
    assert state(other) == state(model)
    assert merge_prodial(wrapped) is wrapped
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())
    remove_prodial(wrap(other))
    assert not any(isinstance(module, ProdialLinear) for module in other.modules())


def test_a_part_that_is_compiled(tmp_path: Path) -> None:
    model = Model()
    model.layers[0] = compiled(model.layers[0])
    apply_prodial(model, CONFIG)
    save_adapter(model, tmp_path)
    assert not any("_orig_mod" in name for name in read_adapter(tmp_path).tensors)
    load_adapter(Model(), tmp_path)
    load_adapter(model, tmp_path)
    other = Model()
    other.layers[1] = compiled(other.layers[1])
    load_adapter(other, tmp_path)


def test_a_part_that_is_checkpointed(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = trained(CONFIG)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    save_adapter(model, tmp_path)
    load_adapter(Model(), tmp_path)


@pytest.mark.usefixtures("one_process")
def test_ddp_comes_after(tmp_path: Path) -> None:
    """Its hooks on gradients are placed once: new parameters would not be averaged."""
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*on the module first"):
        apply_prodial(in_ddp(Model()), CONFIG)


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_is_saved_whole_and_not_merged(tmp_path: Path) -> None:
    """Divided or gathered; with several processes in ``tests/training/distributed``."""
    model = trained(CONFIG)
    expected = state(model)
    save_adapter(model, tmp_path / "plain")
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"is sharded \(a DTensor\).*in every process"):
        merge_prodial(model)
    save_adapter(model, tmp_path / "sharded")
    gathered = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in gathered:
        module.unshard()
    save_adapter(model, tmp_path / "gathered")
    for module in gathered:
        module.reshard()
    described = {
        (tmp_path / name / "adapter_config.json").read_text()
        for name in ("plain", "sharded", "gathered")
    }
    assert len(described) == 1
    for name in ("sharded", "gathered"):
        again = Model()
        load_adapter(again, tmp_path / name)
        assert {name: value for name, value in state(again).items() if "prodial" in name} == {
            name: value for name, value in expected.items() if "prodial" in name
        }


def test_what_zero_has_taken_away_is_refused(tmp_path: Path) -> None:
    """DeepSpeed's third stage leaves empty parameters (0.19.8), as these stand-ins are."""
    model = trained(CONFIG)
    save_adapter(model, tmp_path / "before")
    for parameter in model.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), parameter.new_empty(0)
    with pytest.raises(
        AdapterError, match=r"prodial_blocks is divided .* ZeRO-3.*GatheredParameters"
    ):
        save_adapter(model, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    with pytest.raises(AdapterError, match=r"ZeRO-3.*loaded before deepspeed.initialize"):
        load_adapter(model, tmp_path / "before")
    with pytest.raises(ValueError, match=r"ZeRO-3, and a part of a weight cannot be merged"):
        merge_prodial(model)


def test_a_master_that_zero_keeps_is_loaded_too(tmp_path: Path) -> None:
    """Else the next step of ZeRO-1 or 2 would write the old values over the loaded ones."""
    model = trained(CONFIG)
    save_adapter(model, tmp_path)
    other = trained(CONFIG, seed=5)
    masters = {}
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            parameter.set_full_hp_param = partial(masters.__setitem__, name)
    load_adapter(other, tmp_path)
    assert masters
    assert all(masters[name].equal(p) for name, p in model.named_parameters() if name in masters)
