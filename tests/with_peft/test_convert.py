"""Adapters from this package's files to PEFT's and back: every number, and the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    apply_prodial,
    load_adapter,
    merge_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError, read_adapter
from prodial_kernels.peft import load_peft, to_peft
from prodial_kernels.training.converting import convert_adapter
from support.models import build, randomise_adapters, token_ids
from support.peft_models import adapted, config, logits

IDS = token_ids()


def own(folder: Path, name: str = "mamba2", **options: Any) -> torch.Tensor:
    """Write an adapter of the package's own form; return what its model computes."""
    model = build(name)
    apply_prodial(model, ProdialConfig(**{"r": 3, "lora_alpha": 5, **options}))
    randomise_adapters(model)
    save_adapter(model, folder)
    return logits(model, IDS)


@pytest.mark.parametrize(
    "options",
    [
        {"n_blocks": {"in_proj": 4, "out_proj": 2}},
        {"target_modules": "in_proj", "diagonal": "free"},
        {"target_modules": r".*layers\.\d+\.mixer\.in_proj", "train_scale": False},
    ],
)
def test_prodial_there_and_back(options: dict[str, Any], tmp_path: Path) -> None:
    expected = own(tmp_path / "own", **options)
    to_peft(tmp_path / "own", tmp_path / "peft")
    there = PeftModel.from_pretrained(build("mamba2"), tmp_path / "peft")
    assert torch.equal(logits(there, IDS), expected)

    back = build("mamba2")
    report = load_peft(back, tmp_path / "peft")
    assert report.trainable > 0
    assert torch.equal(logits(back, IDS), expected)
    save_adapter(back, tmp_path / "again")
    first, second = (read_adapter(tmp_path / name).tensors for name in ("own", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # PEFT's own file, of a model that PEFT trained, too.
    load_adapter(build("mamba2"), tmp_path / "again")


def test_plain_lora_to_peft(tmp_path: Path) -> None:
    options = {"train_scale": False, "train_diagonal": False}
    expected = own(tmp_path / "own", target_modules=("in_proj",), **options)
    to_peft(tmp_path / "own", tmp_path / "lora", method="lora")
    model = PeftModel.from_pretrained(build("mamba2"), tmp_path / "lora")
    assert type(model.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 7}])
def test_pefts_lora_to_ours(options: dict[str, Any], tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "in_proj"], **options)
    model = get_peft_model(build("falcon_h1"), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = logits(model, IDS)
    ours = build("falcon_h1")
    load_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours, IDS), expected, rtol=1e-4, atol=1e-5)
    merged = logits(merge_prodial(ours), IDS)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_converted_is_refused(tmp_path: Path) -> None:
    own(tmp_path / "own")
    with pytest.raises(AdapterError, match="has s or D_b"):
        to_peft(tmp_path / "own", tmp_path / "a", method="lora")
    with pytest.raises(ValueError, match="method must be"):
        to_peft(tmp_path / "own", tmp_path / "a", method="dora")
    with pytest.raises(ValueError, match="not an empty directory"):
        to_peft(tmp_path / "own", tmp_path / "own")
    own(tmp_path / "out", train_scale=False, train_diagonal=False)
    with pytest.raises(AdapterError, match="out_proj would be refused or without effect"):
        to_peft(tmp_path / "out", tmp_path / "a", method="lora")
    own(tmp_path / "head", modules_to_save=("norm_f",))
    with pytest.raises(AdapterError, match="holds tensors beside its layers"):
        to_peft(tmp_path / "head", tmp_path / "a")
    assert not (tmp_path / "a").exists()


REFUSED: dict[str, tuple[Any, str]] = {
    "DoRA": (LoraConfig(target_modules=["in_proj"], use_dora=True), "has use_dora"),
    "ranks": (config(rank_pattern={"in_proj": 1}), "has rank_pattern"),
    "layers": (config(layers_to_transform=[0]), "leaves out layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_configuration_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    configuration, message = REFUSED[case]
    get_peft_model(build("mamba2"), configuration).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    model = build("mamba2")
    assert_refused_and_untouched(model, tmp_path, message)


def test_another_models_adapter_and_damage_are_refused(tmp_path: Path) -> None:
    adapted("zamba2").save_pretrained(tmp_path / "zamba2", save_embedding_layers=False)
    assert_refused_and_untouched(build("mamba2"), tmp_path / "zamba2", "does not fit this model")
    assert_refused_and_untouched(
        build("mamba2"), tmp_path / "none", "no adapter that PEFT can read"
    )
    model = adapted("mamba2")
    model.get_parameter(
        "base_model.model.backbone.layers.0.mixer.in_proj.prodial_s.default.weight"
    ).data[0] = float("inf")
    model.save_pretrained(tmp_path / "inf", save_embedding_layers=False)
    assert_refused_and_untouched(build("mamba2"), tmp_path / "inf", "values that are not finite")


def assert_refused_and_untouched(model: nn.Module, folder: Path, message: str) -> None:
    classes = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(AdapterError, match=message):
        load_peft(model, folder)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_model_says_where_lora_would_be_dead(tmp_path: Path) -> None:
    """Jamba calls its out_proj, Bamba hands its weight to a kernel."""
    for name in ("jamba", "bamba"):
        model = build(name)
        config = ProdialConfig(
            r=2, target_modules=("out_proj",), train_scale=False, train_diagonal=False
        )
        apply_prodial(model, config)
        build(name).config.save_pretrained(tmp_path / name)
        save_adapter(model, tmp_path / f"{name}-own", base_model=str(tmp_path / name))
    convert_adapter(tmp_path / "jamba-own", "lora", tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    with pytest.raises(AdapterError, match=r"BambaMixer hands out_proj\.weight to its"):
        convert_adapter(tmp_path / "bamba-own", "lora", tmp_path / "dead")
    assert not (tmp_path / "dead").exists()
    # Without a model, the name decides.
    with pytest.raises(AdapterError, match="refused or without effect before it is merged; give"):
        to_peft(tmp_path / "jamba-own", tmp_path / "dead", method="lora")
