"""``save_pretrained`` of an adapted model: what it writes loads plainly, and resumes exactly."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prodial_kernels import (
    ProdialConfig,
    apply_prodial,
    merge_prodial,
    quantize_model,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.models.adapt.inject import merge_quantized
from prodial_kernels.quantization import QuantizedLinear
from support.models import FAMILIES, build, randomise_adapters, token_ids

CONFIG = ProdialConfig(r=2, n_blocks=4)


def adapted(family: str = "mamba2", format: str | None = None, **options: Any) -> Any:
    model = build(family, **options).eval()
    if format is not None:
        quantize_model(model, format)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def reloaded(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_as_what_was_trained_and_resumes_exactly(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tmp_path), logits(model))
    fresh = build(family, seed=5)
    apply_prodial(fresh, CONFIG)
    # As Trainer does it.
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert_same_state(fresh, model)


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_on_a_quantised_base(format: str, tmp_path: Path) -> None:
    model = adapted(format=format)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tmp_path), logits(model))
    fresh = build("mamba2")
    quantize_model(fresh, format)
    apply_prodial(fresh, CONFIG)
    state = load_file(tmp_path / "model.safetensors")
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert_same_state(fresh, model)


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_quantised_layers_without_an_adapter_are_written_dense(format: str, tmp_path: Path) -> None:
    def make(seed: int = 0) -> Any:
        model = build("bamba", seed=seed).eval()
        quantize_model(model, format, target_modules=("in_proj", "q_proj"))
        apply_prodial(model, CONFIG)
        return model

    model = make()
    randomise_adapters(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tmp_path), logits(model))
    fresh = make()
    state = load_file(tmp_path / "model.safetensors")
    fresh.load_state_dict(state, strict=False)
    assert_same_state(fresh, model)
    with pytest.raises(RuntimeError, match=r"q_proj\.weight is not what the quantised layer here"):
        make(seed=1).load_state_dict(state, strict=False)


def test_copies_pickles_and_parts_save_themselves(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "prodial" in name:
                    parameter.zero_()
        other.save_pretrained(tmp_path / str(number))
        torch.testing.assert_close(reloaded(tmp_path / str(number)), expected)
        merge_prodial(other)
        assert "save_pretrained" not in vars(other)
        assert not other._load_state_dict_pre_hooks
    holder = nn.Module()
    holder.model = build("mamba2")
    apply_prodial(holder, CONFIG)
    randomise_adapters(holder)
    holder.model.save_pretrained(tmp_path / "part")
    torch.testing.assert_close(reloaded(tmp_path / "part"), logits(holder.model))


def test_a_model_around_the_adapted_one_is_not_saved_wrongly(tmp_path: Path) -> None:
    model = build("mamba2")
    for part in (model.backbone, model.backbone.layers[0]):
        for change in (lambda p: apply_prodial(p, CONFIG), lambda p: quantize_model(p, "int8")):
            whole = copy.deepcopy(model)
            path = next(name for name, module in model.named_modules() if module is part)
            inner = whole.get_submodule(path)
            change(inner)
            whole.state_dict()
            with pytest.raises(ValueError, match="a part of this Mamba2ForCausalLM was adapted"):
                whole.save_pretrained(tmp_path / "whole")
    apply_prodial(model.backbone, CONFIG)
    randomise_adapters(model)
    expected = logits(model)
    merge_prodial(model.backbone)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(tmp_path / "merged"), expected)


def test_afterwards_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = build("mamba2")
    before = set(vars(model))
    for undo in (remove_prodial, merge_prodial):
        apply_prodial(model, CONFIG)
        undo(model)
        assert set(vars(model)) == before
        assert not model._load_state_dict_pre_hooks
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tmp_path), logits(model))


def test_a_state_dict_that_was_gathered_elsewhere(tmp_path: Path) -> None:
    model = adapted(format="int8")
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=state)
    torch.testing.assert_close(reloaded(tmp_path), expected)
    trained = {name: tensor for name, tensor in state.items() if "prodial" in name}
    with pytest.raises(ValueError, match="holds a part of a Int8Linear only, without SCB"):
        model.save_pretrained(tmp_path, state_dict=trained)
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match="whose names are not the model's: _orig_mod"):
        model.save_pretrained(tmp_path, state_dict=renamed)


def test_shards(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(reloaded(tmp_path / "shards"), logits(model))


def test_push_to_hub_uploads_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    uploaded = tmp_path / "uploaded"

    def upload(self: Any, working_dir: str, *_: Any, **__: Any) -> None:
        shutil.copytree(working_dir, uploaded)

    created = types.SimpleNamespace(repo_id="me/model")
    hub = types.SimpleNamespace(create_repo=lambda *_, **__: created)
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", _no_card)
    model.push_to_hub("me/model")
    torch.testing.assert_close(reloaded(uploaded), logits(model))


def _no_card(*_: Any, **__: Any) -> Any:
    return types.SimpleNamespace(save=lambda _: None)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("merged", [False, True])
def test_weights_are_not_rescaled_when_they_are_loaded(
    family: str, merged: bool, tmp_path: Path
) -> None:
    model = adapted(family)
    model.config.rescale_prenorm_residual = True
    if merged:
        merge_prodial(model)
    model.save_pretrained(tmp_path)
    assert model.config.rescale_prenorm_residual is not merged
    torch.testing.assert_close(reloaded(tmp_path), logits(model))


@pytest.mark.parametrize("merged", [False, True])
def test_a_tied_head_with_an_adapter(merged: bool, tmp_path: Path) -> None:
    model = build("mamba2", tie_word_embeddings=True)
    model.tie_weights()
    apply_prodial(model, ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "lm_head")))
    randomise_adapters(model)
    if merged:
        merge_prodial(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tmp_path), logits(model))


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_merged_models_are_dense_everywhere(format: str, tmp_path: Path) -> None:
    model = build("bamba")
    quantize_model(model, format, target_modules=("in_proj", "out_proj", "q_proj"))
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    expected = logits(model)
    other = copy.deepcopy(model)
    merge_prodial(model)
    assert not [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(reloaded(tmp_path / "dense"), expected)
    # Quantised in memory, dense on disk.
    merge_quantized(other, format)
    other.save_pretrained(tmp_path / "other")
    torch.testing.assert_close(reloaded(tmp_path / "other"), logits(other))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"distributed checkpoint.*use save_adapter"):
        model.save_pretrained(tmp_path / "a", distributed_checkpoint=True)
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"transformers quantised.*use save_adapter"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


class OfAnotherLibrary(nn.Module):
    """Saves its state dict as mamba_ssm's models and the hub's mix-in do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 8), nn.Linear(8, 4)

    def save_pretrained(self, save_directory: Path) -> None:
        save_directory.mkdir()
        torch.save(self.state_dict(), save_directory / "pytorch_model.bin")


def test_a_model_of_another_library_writes_its_own_format(tmp_path: Path) -> None:
    model = OfAnotherLibrary()
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    model.save_pretrained(tmp_path / "m")
    assert "state_dict" not in vars(model)
    plain = OfAnotherLibrary()
    plain.load_state_dict(torch.load(tmp_path / "m" / "pytorch_model.bin", weights_only=True))
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain.out_proj(plain.in_proj(x)), model.out_proj(model.in_proj(x)))


# --- With a real Trainer. -----------------------------------------------------------------------


def trainer(model: Any, folder: Path, steps: int, **options: Any) -> Trainer:
    ids = token_ids(batch=16, length=8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
        save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, logging_steps=1,
        **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])


def test_trainer_saves_resumes_and_loads_the_best(tmp_path: Path) -> None:
    def fresh() -> Any:
        model = build("mamba2")
        apply_prodial(model, CONFIG)
        return model

    whole = fresh()
    trainer(whole, tmp_path / "whole", 4).train()
    resumed = fresh()
    again = trainer(resumed, tmp_path / "again", 4)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_state(resumed, whole)
    again.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(reloaded(tmp_path / "saved"), logits(whole))
    save_adapter(resumed, tmp_path / "adapter")

    best = fresh()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(best, tmp_path / "best", 4, **options)
    run.train()
    chosen = Path(run.state.best_model_checkpoint)
    expected = fresh()
    expected.load_state_dict(load_file(chosen / "model.safetensors"), strict=False)
    assert_same_state(best, expected)
    assert json.loads((chosen / "config.json").read_text())["architectures"] == [
        "Mamba2ForCausalLM"
    ]
