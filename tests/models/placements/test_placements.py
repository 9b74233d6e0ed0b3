"""Parts of a model as targets: exactly the layers of that part, whatever the family calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial, load_adapter, save_adapter
from prodial_kernels.checkpoint import read_adapter
from prodial_kernels.models.adapt.inject import get_prodial_config
from support.mixers.toy import Toy
from support.models import FAMILIES, build

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {
    "jamba": {"gate_proj", "up_proj", "down_proj"},
    "bamba": {"gate_proj", "up_proj", "down_proj"},
    "zamba": {"gate_proj", "up_proj", "down_proj"},
    "zamba2": {"gate_up_proj", "down_proj"},
    "falcon_h1": {"gate_proj", "up_proj", "down_proj"},
    "granitemoehybrid": {"input_linear", "output_linear"},
    "nemotron_h": {"up_proj", "down_proj"},
}


def adapted(model: nn.Module, targets: Any) -> set[str]:
    apply_prodial(model, ProdialConfig(r=2, target_modules=targets))
    return {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, ProdialLinear)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    mixer = {"in_proj", "out_proj"}
    hybrid = name in MLP
    assert adapted(build(name), "mixer") == mixer
    if hybrid:
        assert adapted(build(name), "attention") == ATTENTION
        assert adapted(build(name), ["mlp", "mixer"]) == MLP[name] | mixer
        assert adapted(build(name), "all") == mixer | ATTENTION | MLP[name]
    else:
        with pytest.raises(ValueError, match="'attention': this model has no such layers; it has"):
            adapted(build(name), "attention")
    whole = hybrid and not name.startswith("zamba")
    assert adapted(build(name), "auto") == (mixer | ATTENTION | MLP[name] if whole else mixer)


def test_routers_and_heads_are_in_no_part() -> None:
    model = build("nemotron_h")
    apply_prodial(model, ProdialConfig(r=2, target_modules="all"))
    assert type(model.lm_head) is nn.Linear


def test_a_layer_of_another_part_with_the_same_name_is_left_alone() -> None:
    """LFM2's convolutions and attention both end in out_proj."""
    import transformers

    config = transformers.Lfm2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=48,
        num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config)
    apply_prodial(model, ProdialConfig(r=2, target_modules="mixer"))
    paths = {path for path, m in model.named_modules() if isinstance(m, ProdialLinear)}
    assert paths == {f"model.layers.0.conv.{name}" for name in ("in_proj", "out_proj")}
    assert get_prodial_config(model).target_modules == ("in_proj", "conv.out_proj")


def test_a_file_keeps_the_names_of_layers(tmp_path: Path) -> None:
    model = build("bamba")
    apply_prodial(model, ProdialConfig(r=2, target_modules="attention"))
    save_adapter(model, tmp_path)
    assert {*read_adapter(tmp_path).config.target_modules} == ATTENTION
    load_adapter(build("bamba"), tmp_path)


def test_a_model_without_parts() -> None:
    with pytest.raises(ValueError, match="it has none that a placement knows"):
        apply_prodial(nn.Sequential(nn.Linear(2, 2)), ProdialConfig(r=1, target_modules="auto"))
    assert adapted(Toy(), ["in_proj", "out_proj"]) == {"in_proj", "out_proj"}
