"""``hotswap_adapter``: new values in place, under compiled and captured blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from prodial_kernels.peft import hotswap_adapter
from support.captured.steps import gradients, same, step, warmed
from support.models import build, token_ids
from support.peft_models import MIXES_METHODS, adapted, config, layers, logits, move

IDS = token_ids()

pytestmark = [
    # PEFT 0.18 asks for the base model's directory, which a model made in memory has not.
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def other(folder: Path, adapter: str = "default", **options: Any) -> Path:
    """A saved adapter with other values."""
    model = adapted(adapter=adapter, **options)
    move(model, adapter, seed=7)
    model.save_pretrained(folder)
    return folder if adapter == "default" else folder / adapter


def of_layers(number: int, seed: int = 2) -> Any:
    model = get_peft_model(build("mamba2", num_hidden_layers=number), config())
    move(model, "default", seed)
    return model


def loaded(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(build("mamba2"), folder, is_trainable=True)


def test_values_change_and_tensors_stay(tmp_path: Path) -> None:
    folder = other(tmp_path, "another")
    model = adapted(adapter="mine")
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    expected = logits(loaded(folder), IDS)
    assert not torch.equal(logits(model, IDS), expected)
    hotswap_adapter(model, str(folder), "mine")
    assert torch.equal(logits(model, IDS), expected)
    for name, parameter in model.named_parameters():
        assert before[name][0] is parameter, name
        assert before[name][1] == parameter.data_ptr(), name


def test_an_inactive_adapter_of_two(tmp_path: Path) -> None:
    folder = other(tmp_path)
    model = adapted(adapter="one")
    model.add_adapter("two", config())
    active = logits(model, IDS)
    hotswap_adapter(model, str(folder), "two")
    assert torch.equal(logits(model, IDS), active)
    model.set_adapter("two")
    assert torch.equal(logits(model, IDS), logits(loaded(folder), IDS))


@pytest.mark.skipif(not MIXES_METHODS, reason="this PEFT cannot save two methods together")
def test_with_lora_and_a_saved_module_beside(tmp_path: Path) -> None:
    options = {"lora": LoraConfig(r=2, target_modules=["q_proj"]), "modules_to_save": ["lm_head"]}

    def made(seed: int) -> Any:
        model = get_peft_model(build("falcon_h1"), config(n_blocks=1, **copy.deepcopy(options)))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        return model

    source, model = made(1), made(2)
    source.save_pretrained(tmp_path)
    assert not torch.equal(logits(model, IDS), logits(source, IDS))
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model, IDS), logits(source, IDS))


def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    source, model = of_layers(1, seed=7), of_layers(1)
    source.save_pretrained(tmp_path)
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    layer, expected = layers(model)[0], layers(source)[0]
    run = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, layer.in_features)
    before = run(x)
    hotswap_adapter(model, str(tmp_path), "default")
    y, right = run(x), expected(x)
    assert not torch.allclose(y, before)
    assert torch.equal(y, right)
    (y.sum() + right.sum()).backward()
    same(gradients(layer), gradients(expected))
    assert backend.frame_count == 1
    torch.compiler.reset()


def test_captured_blocks_replay_with_the_new_values(tmp_path: Path) -> None:
    source, model = of_layers(4, seed=7), of_layers(4)
    source.save_pretrained(tmp_path)
    engine = warmed(model.base_model.model)
    step(model, IDS)
    gradients(model)
    replays = engine.forwards
    assert engine.captures == 1
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(step(model, IDS), step(source, IDS))
    same(gradients(model), gradients(source))
    assert engine.captures == 1
    assert engine.forwards > replays


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 3}, "lora_alpha of .* cannot change in place"),
        ({"lora_dropout": 0.5}, "lora_dropout of "),
        ({"r": 3}, "^r of "),
        ({"n_blocks": {"in_proj": 2, "out_proj": 2}}, "n_blocks of "),
        (
            {"target_modules": ["in_proj"], "n_blocks": {"in_proj": 4}},
            "^the saved adapter does not have .*out_proj",
        ),
        ({"modules_to_save": ["lm_head"]}, "the model's adapter does not have .*lm_head"),
    ],
)
def test_other_settings_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    folder = other(tmp_path, **options)
    model = adapted()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(folder), "default")
    assert torch.equal(logits(model, IDS), before)


def test_other_refusals(tmp_path: Path) -> None:
    folder = other(tmp_path / "prodial")
    model = adapted()
    with pytest.raises(ValueError, match=r"got 'none'; it has \['default'\]"):
        hotswap_adapter(model, str(folder), "none")
    with pytest.raises(TypeError, match=r"must be a PeftModel.*prodial_kernels.load_adapter"):
        hotswap_adapter(model.base_model.model, str(folder), "default")
    lora = get_peft_model(build("mamba2"), LoraConfig(r=2, target_modules=["in_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"holds a .*LORA adapter"):
        hotswap_adapter(model, str(tmp_path / "lora"), "default")
    with pytest.raises(ValueError, match=r"for LoRA use peft\.utils\.hotswap"):
        hotswap_adapter(lora, str(folder), "default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, str(folder), "default")


def test_in_a_compiled_model(tmp_path: Path) -> None:
    folder = other(tmp_path)
    model = adapted()
    hotswap_adapter(torch.compile(model, backend="eager"), str(folder), "default")
    assert torch.equal(logits(model, IDS), logits(loaded(folder), IDS))
