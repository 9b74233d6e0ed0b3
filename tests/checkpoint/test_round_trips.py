"""Saved adapters: what the files hold, and that loading gives back every bit."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError, read_adapter
from prodial_kernels.checkpoint.card import CARD_FILE
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE
from prodial_kernels.checkpoint.peft_form import file_name, plain_name
from support.saved_adapters import CONFIG, Model, state, trained


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ProdialConfig(r=0, block_size=6, diagonal="free"),
        ProdialConfig(r=2, lora_alpha=7.5, lora_dropout=0.25, train_diagonal=False),
        ProdialConfig(r=1, target_modules=r"layers\.1\..*_proj", train_scale=False,
                      allow_partial=True, block_size=12),
    ],
    ids=["blocks", "no-lora", "no-diagonal", "regex"],
)  # fmt: skip
def test_round_trip_is_exact(tmp_path: Path, config: ProdialConfig) -> None:
    source = trained(config)
    save_adapter(source, tmp_path)
    plain = Model()
    report = load_adapter(plain, tmp_path)
    assert state(plain) == state(source)
    assert report.trainable == sum(p.numel() for p in source.parameters() if p.requires_grad)
    x = torch.randn(5, 12)
    assert torch.equal(plain.eval()(x), source.eval()(x))
    # And again into the adapted model, over other values.
    other = trained(config, seed=2).eval()
    load_adapter(other, tmp_path)
    assert state(other) == state(source)


def test_files_hold_what_the_format_says(directory: Path) -> None:
    assert sorted(p.name for p in directory.iterdir()) == [CARD_FILE, CONFIG_FILE, TENSOR_FILE]
    stored = load_file(directory / TENSOR_FILE)
    assert "base_model.model.layers.0.in_proj.prodial_A.weight" in stored
    tensors = {plain_name(name): tensor for name, tensor in stored.items()}
    assert {file_name(name) for name in tensors} == stored.keys()
    parts = ("prodial_a", "prodial_b", "prodial_blocks", "prodial_scale")
    assert sorted(tensors) == sorted(
        [f"layers.{i}.{proj}.{part}" for i in range(2) for proj in ("in_proj", "out_proj")
         for part in parts]
        + [f"head.0.{name}" for name in ("bias", "weight")]
        + [f"head.1.{name}" for name in ("bias", "num_batches_tracked", "running_mean",
                                         "running_var", "weight")]
    )  # fmt: skip
    header = json.loads((directory / CONFIG_FILE).read_text())
    assert header["format_version"] == 3
    assert ProdialConfig.from_dict(header["config"]) == CONFIG
    assert header["tensors"]["layers.0.in_proj.prodial_blocks"] == {
        "shape": [4, 3, 3], "dtype": "float32",
    }  # fmt: skip
    assert list(header["base"]["layers"]) == [
        f"layers.{i}.{proj}" for i in range(2) for proj in ("in_proj", "out_proj")
    ]


def test_read_adapter_needs_no_model(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path, base_model="somewhere/mamba")
    saved = read_adapter(str(tmp_path))
    assert saved.config == CONFIG
    assert saved.base_model == "somewhere/mamba"
    name = "layers.1.out_proj.prodial_b"
    assert torch.equal(saved.tensors[name], model.get_parameter(name))


def test_the_models_own_name_is_the_default_base_model(tmp_path: Path) -> None:
    model = trained()
    model.name_or_path = "state-spaces/mamba-130m-hf"
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).base_model == "state-spaces/mamba-130m-hf"


def test_masters_keep_their_dtype_in_a_16_bit_model(tmp_path: Path) -> None:
    source = trained(model=Model().to(torch.bfloat16))
    save_adapter(source, tmp_path)
    tensors = read_adapter(tmp_path).tensors
    assert tensors["layers.0.in_proj.prodial_scale"].dtype == torch.float32
    # Trained beside the adapter, so a master as well.
    assert tensors["head.0.weight"].dtype == torch.float32
    plain = Model().to(torch.bfloat16)
    load_adapter(plain, tmp_path)
    assert state(plain) == state(source)


def test_fp64_adapters_are_not_narrowed(tmp_path: Path) -> None:
    save_adapter(trained(model=Model().double()), tmp_path)
    double = Model().double()
    load_adapter(double, tmp_path)
    plain = Model()
    with pytest.raises(AdapterError, match=r"float32 or narrower, got torch\.float64"):
        load_adapter(plain, tmp_path)
    assert state(plain) == state(Model())


def test_shared_layers_are_saved_once(tmp_path: Path) -> None:
    def shared() -> nn.Module:
        model = Model()
        model.layers.append(model.layers[0])
        return model

    source = trained(model=shared())
    save_adapter(source, tmp_path)
    assert not any(name.startswith("layers.2") for name in read_adapter(tmp_path).tensors)
    plain = shared()
    load_adapter(plain, tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(plain(x), source(x))


def test_tied_tensors_are_saved(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = Model()
        model.head[1] = nn.Linear(12, 3)
        model.head[1].weight = model.head[0].weight
        return model

    source = trained(model=tied())
    save_adapter(source, tmp_path)
    plain = tied()
    load_adapter(plain, tmp_path)
    assert state(plain) == state(source)


def test_saving_replaces_what_was_there(directory: Path) -> None:
    second = trained(seed=2)
    save_adapter(second, directory)
    plain = Model()
    load_adapter(plain, directory)
    assert state(plain) == state(second)
    assert len(list(directory.iterdir())) == 3


def test_a_loaded_adapter_can_be_saved_removed_and_merged(directory: Path, tmp_path: Path) -> None:
    plain = Model()
    load_adapter(plain, directory)
    save_adapter(plain, tmp_path / "again")
    again, first = tmp_path / "again" / TENSOR_FILE, directory / TENSOR_FILE
    assert again.read_bytes() == first.read_bytes()
    x = torch.randn(5, 12)
    expected = plain.eval()(x)
    torch.testing.assert_close(merge_prodial(copy.deepcopy(plain))(x), expected)
    removed = remove_prodial(plain)
    assert not any(isinstance(module, ProdialLinear) for module in removed.modules())


def test_impl_may_differ(directory: Path) -> None:
    config = ProdialConfig(**{**CONFIG.to_dict(), "impl": "reference"})
    load_adapter(trained(config), directory)


def test_checkpoint_never_unpickles(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    load_adapter(Model(), directory)
    assert "pickle" not in vars(sys.modules["prodial_kernels.checkpoint.adapter"])
