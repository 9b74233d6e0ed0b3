"""Adapters on disk, as PEFT and transformers write and find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Zamba2ForSequenceClassification, pipeline

from prodial_kernels.peft import ProdialPeftConfig
from support.models import FAMILIES, build, token_ids
from support.peft_models import LOADS_INTO_TRANSFORMERS, adapted, config, layers, logits, move
from support.tiny_model import write_tiny_model

IDS = token_ids()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base")


def saved(base: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter's directory, and what the model that it was saved from computes."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, config(task_type="CAUSAL_LM", **options))
    move(model, "default")
    folder = base.parent / "adapter"
    model.save_pretrained(folder)
    return folder, logits(model, IDS)


def test_the_files_are_those_that_peft_knows(base: Path) -> None:
    folder, _ = saved(base, rank_pattern={"out_proj": 1}, layers_to_transform=[0, 1])
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["peft_type"] == "PRODIAL"
    assert values["base_model_name_or_path"] == str(base)
    assert values["target_modules"] == ["in_proj", "out_proj"]
    assert values["rank_pattern"] == {"out_proj": 1}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4
    shapes = {
        name.removeprefix("base_model.model.backbone.layers.1.mixer."): list(tensor.shape)
        for name, tensor in tensors.items()
        if ".layers.1." in name
    }
    assert shapes == {
        "in_proj.prodial_D.weight": [4, 8, 8],
        "in_proj.prodial_s.weight": [152],
        "in_proj.prodial_A.weight": [2, 32],
        "in_proj.prodial_B.weight": [152, 2],
        "out_proj.prodial_D.weight": [2, 32, 32],
        "out_proj.prodial_s.weight": [32],
        "out_proj.prodial_A.weight": [1, 64],
        "out_proj.prodial_B.weight": [32, 1],
    }
    again = PeftConfig.from_pretrained(folder)
    assert isinstance(again, ProdialPeftConfig)
    assert again.to_dict() == {**values, "task_type": again.task_type, "peft_type": "PRODIAL"}


def test_every_way_to_load_gives_the_same_model(base: Path) -> None:
    folder, expected = saved(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(logits(plain, IDS), expected)

    def attached() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(str(folder))
        return model

    ways = {
        "PeftModel": lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), folder
        ),
        "without memory first": lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), folder, low_cpu_mem_usage=True
        ),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        "model.load_adapter": attached,
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "pipeline": lambda: pipeline("text-generation", model=str(folder)).model,
    }
    if not LOADS_INTO_TRANSFORMERS:
        for way in ("model.load_adapter", "AutoModel", "pipeline"):
            # PEFT 0.18 has not even what transformers asks of it.
            with pytest.raises((ValueError, ImportError), match=r"PEFT 0\.20|weight_conversion"):
                ways.pop(way)()
    for way, load in ways.items():
        model = load()
        assert torch.equal(logits(model, IDS), expected), way
        assert not [p for p in model.parameters() if p.requires_grad], way
    again = PeftModel.from_pretrained(plain, folder, is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == 2 * 2 * 4


def test_merged_models_load_without_this_package(base: Path, tmp_path: Path) -> None:
    # What transformers divides by √layers at every load must not be divided once more.
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "rescale_prenorm_residual": True}))
    folder, expected = saved(base)
    merged = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain, IDS), expected, rtol=1e-4, atol=1e-5)
    assert (
        plain.state_dict().keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    )


def test_several_adapters_are_saved_beside_each_other(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("wide", config(r=5, n_blocks=None))
    move(model, "wide", seed=3)
    first = logits(model, IDS)
    model.set_adapter("wide")
    second = logits(model, IDS)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (tmp_path / "wide" / "adapter_model.safetensors").exists()

    again = PeftModel.from_pretrained(build("mamba2"), tmp_path)
    again.load_adapter(tmp_path / "wide", "other name")
    assert torch.equal(logits(again, IDS), first)
    again.set_adapter("other name")
    assert torch.equal(logits(again, IDS), second)
    assert layers(again)[0].r == 5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_to_save_are_trained_saved_and_merged(tmp_path: Path) -> None:
    model = adapted("zamba2", modules_to_save=["final_layernorm"])
    saved_module = model.get_base_model().model.final_layernorm
    saved_module.modules_to_save["default"].weight.data.mul_(1.5)
    assert saved_module.modules_to_save["default"].weight.requires_grad
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(build("zamba2"), tmp_path)
    assert torch.equal(logits(again, IDS), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again, IDS), logits(build("zamba2"), IDS))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-5)


def test_a_classifiers_head_is_trained_and_saved_by_itself(tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        configuration = build("zamba2").config
        configuration.num_labels = 3
        return Zamba2ForSequenceClassification(configuration)

    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))
    move(model, "default")
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert head.requires_grad
    head.data.add_(0.1)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(again, IDS), expected)
    merged = logits(again.merge_and_unload(), IDS)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_other_shapes_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(build("mamba2"), tmp_path)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_head_of_16_bits_is_trained_in_32(tmp_path: Path) -> None:
    """PEFT's own methods leave it in 16 bits, where steps of 1e-5 are rounded away."""
    import transformers

    torch.manual_seed(0)
    family = FAMILIES["jamba"]
    config = transformers.JambaConfig(**family.options, vocab_size=48, pad_token_id=0, num_labels=3)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return transformers.JambaForSequenceClassification(config).bfloat16()

    model = get_peft_model(base(), ProdialPeftConfig(r=2, task_type="SEQ_CLS")).train()
    head = model.base_model.model.score.modules_to_save["default"]
    master = head._parameters["weight"]
    assert master.dtype == torch.float32
    assert head.weight.dtype == torch.bfloat16
    before = master.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = token_ids()
    for _ in range(3):
        model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (master.detach() != before).all()
    logits = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged.score) is nn.Linear
    assert {parameter.dtype for parameter in merged.score.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0.05, atol=0.02)
