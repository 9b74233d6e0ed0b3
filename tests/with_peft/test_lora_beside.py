"""PEFT's LoRA on attention and MLP beside ProDiaL on the mixers, as one adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from support.models import build, token_ids
from support.peft_models import MIXES_METHODS, adapted, config, layers, logits

IDS = token_ids()

pytestmark = pytest.mark.skipif(
    not MIXES_METHODS, reason=f"PEFT {peft.__version__} saves one method only"
)

# Of each family: what gets LoRA beside the mixers' projectors.
LORA_TARGETS = {
    "falcon_h1": ["q_proj", "v_proj", "o_proj", "gate_proj"],
    "jamba": ["q_proj", "v_proj"],
    "nemotron_h": ["q_proj", "o_proj"],
    "bamba": ["k_proj", "up_proj"],
}


def both(name: str, **lora: Any) -> PeftModel:
    options = {"r": 3, "target_modules": LORA_TARGETS[name], **lora}
    model = adapted(name, lora=LoraConfig(**options))
    move_lora(model)
    return model


@torch.no_grad()
def move_lora(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_both_compute_train_and_merge_as_each_alone(name: str) -> None:
    model = both(name)
    # PEFT's own LoRA on a model with the same ProDiaL weights merged in is the same function.
    alone = adapted(name)
    mine = model.state_dict()
    alone.load_state_dict(
        {n: mine[n] for n in alone.state_dict() if ".prodial_" in n}, strict=False
    )
    merged = alone.merge_and_unload()
    lora = get_peft_model(merged, LoraConfig(r=3, target_modules=LORA_TARGETS[name]))
    state = {n: p for n, p in mine.items() if ".lora_" in n}
    assert state.keys() == {n for n in lora.state_dict() if ".lora_" in n}
    lora.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(model, IDS), logits(lora, IDS), rtol=1e-4, atol=1e-5)

    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert gradients == {n for n, p in model.named_parameters() if p.requires_grad}
    for kind in ("prodial_D", "prodial_s", "prodial_A", "prodial_B", "lora_A", "lora_B"):
        assert any(f".{kind}.default." in n for n in gradients), kind

    expected = logits(model, IDS)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(build(name), IDS))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    assert plain.state_dict().keys() == build(name).state_dict().keys()
    torch.testing.assert_close(logits(plain, IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_one_directory_holds_both(options: dict[str, Any], tmp_path: Path) -> None:
    model = both("falcon_h1", rank_pattern={"q_proj": 2}, **options)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("falcon_h1"), tmp_path)
    assert torch.equal(logits(again, IDS), expected)
    assert again.peft_config["default"].lora.rank_pattern == {"q_proj": 2}
    # Loading into a model that has an adapter already, and deleting, take both as one.
    other = adapted("falcon_h1", adapter="first")
    before = logits(other, IDS)
    other.load_adapter(tmp_path, "second")
    assert torch.equal(logits(other, IDS), before)
    other.set_adapter("second")
    assert torch.equal(logits(other, IDS), expected)
    other.set_adapter("first")
    assert torch.equal(logits(other, IDS), before)
    other.delete_adapter("second")
    assert torch.equal(logits(other, IDS), before)
    assert not [n for n in other.state_dict() if ".second" in n]


def test_unload_and_copies() -> None:
    model = both("falcon_h1")
    twin = copy.deepcopy(model)
    expected = logits(model, IDS)
    assert torch.equal(logits(model.unload(), IDS), logits(build("falcon_h1"), IDS))
    assert torch.equal(logits(twin, IDS), expected)


def test_transformers_own_loader_would_lose_one_and_is_refused(tmp_path: Path) -> None:
    both("falcon_h1").save_pretrained(tmp_path)
    model = build("falcon_h1")
    with pytest.raises(ValueError, match=r"needs a PeftModel.*AutoPeftModelForCausalLM"):
        model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="needs a PeftModel"):
        inject_adapter_in_model(config(lora=LoraConfig(target_modules=["q_proj"])), model)
    assert not layers(model)


def test_a_layer_with_another_methods_adapter_is_refused() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["in_proj"]), build("falcon_h1"))
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ValueError, match="has an adapter of another method"),
    ):
        inject_adapter_in_model(config(), model, "prodial")
