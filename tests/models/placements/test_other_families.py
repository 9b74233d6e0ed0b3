"""Gated delta nets, short convolutions and the like: adapted by placement, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    load_adapter,
    merge_prodial,
    quantize_model,
    save_adapter,
)
from prodial_kernels.linear import OFFSET
from prodial_kernels.models.methods.offsets import ssm_parameters
from prodial_kernels.quantization.model import make_dense
from support.mixers.adapted_families import EffectiveWeight, assert_alive_and_equal
from support.mixers.other_families import OTHERS, build_other
from support.mixers.real_lora import live_loras, said
from support.models import Step, build, randomise_adapters, token_ids, training_step

EMPTY: Mapping[str, str] = MappingProxyType({})


def adapted(name: str, targets: str = "mixer", **overrides: Any) -> nn.Module:
    model = build_other(name, **overrides)
    parts = ("all",) if ssm_parameters(model) else ()
    config = ProdialConfig(
        r=2, lora_alpha=4, diagonal="free", target_modules=targets, train_ssm=parts
    )
    apply_prodial(model, config)
    randomise_adapters(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in named_offsets(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def named_offsets(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if OFFSET in name}


def oracle_step(name: str, model: nn.Module) -> Step:
    """The same step on plain layers with W' as their weight and moved parameters of their own."""
    plain = build_other(name)
    own = {offset.replace(OFFSET, ""): offset for offset in named_offsets(model)}
    return step_of_plain(plain, model, own)


def step_of_plain(plain: nn.Module, model: nn.Module, own: Mapping[str, str] = EMPTY) -> Step:
    """Of ``plain`` with the weights that ``model`` computes with; ``own``: offsets by parameter."""
    plain.requires_grad_(False)
    for path, layer in model.named_modules():
        if isinstance(layer, ProdialLinear):
            effective = EffectiveWeight(layer)
            parametrize.register_parametrization(plain.get_submodule(path), "weight", effective)
    for path, offset in own.items():
        parameter = plain.get_parameter(path)
        parameter.data += model.get_parameter(offset).detach()
        parameter.requires_grad_()
    step = training_step(plain, token_ids())
    renamed = {n.replace("parametrizations.weight.0.", ""): g for n, g in step.gradients.items()}
    return Step(step.logits, {own.get(n, n): g for n, g in renamed.items()})


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_equals_that_of_plain_layers(name: str) -> None:
    model = adapted(name)
    assert_alive_and_equal(training_step(model, token_ids()), oracle_step(name, model))


@pytest.mark.parametrize("name", OTHERS)
def test_every_part_is_adapted_and_merges(name: str, tmp_path: Path) -> None:
    model = adapted(name, "all").eval()
    logits = model(input_ids=token_ids(), use_cache=False).logits
    save_adapter(model, tmp_path)
    again = build_other(name).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=token_ids(), use_cache=False).logits, logits)
    merge_prodial(model)
    merged = model(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(merged, logits, rtol=1e-3, atol=1e-4)
    assert model.state_dict().keys() == build_other(name).state_dict().keys()


@pytest.mark.parametrize("name", [*OTHERS, "granitemoehybrid", "jamba", "nemotron_h"])
def test_a_step_on_everything_in_4_bits(name: str) -> None:
    model = build_other(name) if name in OTHERS else build(name)
    quantize_model(model, "nf4", target_modules="all")
    dense = copy.deepcopy(model)
    make_dense(dense)
    # Scales and diagonals near 1: wild ones leave little to fp32 in a few of these models.
    apply_prodial(model, ProdialConfig(r=2, lora_alpha=1, target_modules="all"))
    randomise_adapters(model)
    assert_alive_and_equal(training_step(model, token_ids()), step_of_plain(dense, model))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("name", OTHERS)
def test_the_doctor_finds_nothing_dead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_other(name)
    statuses = said(model)
    assert {*statuses.values()} == {"adapted"}
    live = live_loras(model, "all-linear", monkeypatch)
    assert dict.fromkeys(live, True) == live


def test_layers_of_the_same_name_are_told_apart_by_their_numbers() -> None:
    """Kimi's delta attention and its latent attention are both called self_attn."""
    if "kimi_linear" not in OTHERS:
        pytest.skip("this transformers has no KimiLinear")
    types = ["linear_attention", "full_attention"] * 2
    model = build_other("kimi_linear", num_hidden_layers=4, layer_types=types)
    apply_prodial(model, ProdialConfig(r=2, target_modules="mixer"))
    numbers = {
        path.split(".")[2] for path, m in model.named_modules() if isinstance(m, ProdialLinear)
    }
    assert numbers == {"0", "2"}


def test_the_default_targets_name_the_way_out() -> None:
    if "olmo_hybrid" not in OTHERS:
        pytest.skip("this transformers has no OlmoHybrid")
    with pytest.raises(ValueError, match=r'target_modules="mixer" means linear_attn\.q_proj'):
        apply_prodial(build_other("olmo_hybrid"), ProdialConfig(r=2))
