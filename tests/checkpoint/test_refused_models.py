"""Models that an adapter does not fit, or that have none to save, are refused untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from prodial_kernels import ProdialConfig, ProdialLinear, load_adapter, save_adapter
from prodial_kernels.checkpoint import AdapterError
from support.saved_adapters import CONFIG, Mixer, Model, expect_refusal, trained


def test_head_of_another_size(directory: Path) -> None:
    model = Model()
    model.head[0] = nn.Linear(12, 4)
    expect_refusal(directory, r"head.0.* must have shape \[4", model)


def test_no_adapter_in_the_model(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this Model has no ProDiaL adapter"):
        save_adapter(Model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_layer_that_was_put_in_after_the_adapter(tmp_path: Path) -> None:
    model = trained()
    model.layers[1].in_proj = nn.Linear(8, 12)
    with pytest.raises(AdapterError, match=r"layers\.1\.in_proj has no adapter, though"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_layers_placed_by_hand_have_no_configuration(directory: Path) -> None:
    model = Model()
    model.layers[0].in_proj = ProdialLinear.from_linear(model.layers[0].in_proj)
    expect_refusal(directory, "this Model has no ProDiaL adapter", model)


def test_another_configuration(directory: Path) -> None:
    config = ProdialConfig(**{**CONFIG.to_dict(), "r": 2, "lora_alpha": 4.0})
    expect_refusal(directory, r"r=4 \(the model has 2\); call remove_prodial", trained(config))


def test_merged_layers(directory: Path) -> None:
    model = trained()
    model.layers[0].in_proj.merge()
    expect_refusal(directory, "merged; call unmerge", model)


def test_target_that_the_model_has_not(directory: Path) -> None:
    expect_refusal(
        directory, "does not fit this model: .*matches nothing", nn.Sequential(nn.Linear(3, 3))
    )


def test_other_layers_than_the_adapters(directory: Path) -> None:
    model = Model()
    model.layers.append(Mixer())
    expect_refusal(directory, r"has nothing for layers\.2\.in_proj, layers\.2\.out_proj", model)
    fewer = Model()
    del fewer.layers[1]
    expect_refusal(directory, r"it adapts layers\.1\.in_proj, which is no target here", fewer)


def test_other_shapes(directory: Path) -> None:
    model = Model()
    model.layers[1].in_proj = nn.Linear(12, 36, bias=False)
    expect_refusal(
        directory, r"layers\.1\.in_proj must have shape .*\[48, 12\], got \[36, 12\]", model
    )


def test_meta_device(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"layers\.0\.in_proj\.weight is on the meta device"):
        load_adapter(Model().to("meta"), directory)
    with pytest.raises(AdapterError, match=r"prodial_blocks is on the meta device"):
        save_adapter(trained().to("meta"), tmp_path / "new")


def test_base_that_is_not_finite(tmp_path: Path) -> None:
    model = trained()
    model.layers[1].out_proj.base_layer.weight[:] = float("nan")
    with pytest.raises(AdapterError, match=r"base weight of layers\.1\.out_proj is not finite"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
