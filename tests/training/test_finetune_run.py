"""Whole runs on a tiny model: every method, what they learn, and what they leave behind."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear, apply_prodial, load_adapter
from prodial_kernels.training import FinetuneConfig, FinetuneResult, finetuning
from prodial_kernels.training.data.splits import load_documents
from prodial_kernels.training.inspecting import inspect_adapter
from prodial_kernels.training.merging import MergeError
from prodial_kernels.training.method import matched_lora_rank
from prodial_kernels.training.run.metrics import read_metrics
from support.tiny_run import load, run


@pytest.fixture(scope="module")
def prodial_run(place: Path) -> FinetuneResult:
    return run(place, place / "prodial", lora_dropout=0.1, draws=True)


def test_learns_and_reports(prodial_run: FinetuneResult) -> None:
    assert prodial_run.after["bits_per_byte"] < 0.95 * prodial_run.before["bits_per_byte"]
    assert prodial_run.agreement.relative < 1e-5
    assert 0 < prodial_run.trainable < prodial_run.total
    assert prodial_run.peak_bytes > 2**20
    table = str(prodial_run)
    for piece in ("held-out bits per byte", "trainable parameters", "peak memory", "time", "%)"):
        assert piece in table


def test_leaves_everything_behind(prodial_run: FinetuneResult) -> None:
    folder = prodial_run.output
    names = {"adapter", "loss.png", "merged", "metrics.jsonl", "results.json", "run.json", "state"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 5, 10, 12]
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 12
    assert results["agreement"]["relative"] <= results["agreement"]["relative_tolerance"]
    assert results["best"]["bits_per_byte"] <= results["after"]["bits_per_byte"]
    assert (results["data"]["train"], results["data"]["rows_cut"]) == (54, 0)
    assert "text.txt: divided at blank lines into 60 texts" in results["data"]["notes"]
    assert results["versions"] == json.loads((folder / "run.json").read_text())["made_with"]
    assert results["implementation"] == "torch on cpu"
    assert re.search(r"projectors +torch on cpu", str(prodial_run))
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["step-000008", "step-000012"]


def test_adapter_and_merged_model_are_the_trained_model(
    place: Path, prodial_run: FinetuneResult
) -> None:
    adapted = load(place / "model")
    load_adapter(adapted, prodial_run.output / "adapter")
    merged = load(prodial_run.model_dir)
    assert not [m for m in merged.modules() if isinstance(m, ProdialLinear)]
    tokens = torch.randint(0, 257, (2, 40))
    with torch.inference_mode():
        base = load(place / "model")(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits)
        assert not torch.allclose(merged(tokens).logits, base, atol=1e-2)


def test_inspection_sees_the_training(prodial_run: FinetuneResult) -> None:
    inspection = inspect_adapter(prodial_run.output / "adapter")
    assert inspection.trainable == prodial_run.trainable
    assert [layer.module for layer in inspection.layers] == [
        f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")
    ]
    for layer in inspection.layers:
        assert layer.diagonal_max is not None
        assert layer.diagonal_max > 0
        assert layer.scale_max is not None
        assert layer.scale_max > 0
        assert layer.lora_norm is not None
        assert layer.lora_norm > 0
    assert "backbone.layers.0.mixer.in_proj" in str(inspection)


def test_lora_of_the_same_size(place: Path, tmp_path: Path, prodial_run: FinetuneResult) -> None:
    result = run(place, tmp_path / "lora", method="lora")
    assert result.after["bits_per_byte"] < result.before["bits_per_byte"]
    layers = inspect_adapter(tmp_path / "lora" / "adapter").layers
    assert {layer.r for layer in layers} == {result.rank}
    assert all(layer.scale_mean is None and layer.diagonal_mean is None for layer in layers)
    per_rank = result.trainable // (result.rank or 1)
    assert abs(result.trainable - prodial_run.trainable) <= per_rank / 2
    assert result.before == prodial_run.before


@pytest.mark.parametrize(
    ("options", "target"),
    [({"r": 2}, 0), ({"r": 4, "block_size": 8}, 0), ({"r": 1, "train_scale": False}, 0)],
)
# Ranks around it may be wider than such small layers.
@pytest.mark.filterwarnings("ignore:r=.* is not below min")
def test_matched_rank_is_the_closest(options: dict[str, Any], target: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(16, 56), nn.Linear(32, 16)

    def size(config: Any) -> int:
        return apply_prodial(nn.Sequential(Block(), Block()), config).trainable

    reference = FinetuneConfig(**options).adapter()
    rank = matched_lora_rank(nn.Sequential(Block(), Block()), reference)
    goal = size(reference)
    distances = {
        r: abs(size(FinetuneConfig(method="lora", r=r).adapter()) - goal)
        for r in range(1, 2 * rank + 8)
    }
    assert distances[rank] == min(distances.values())


def test_full_fine_tuning_writes_a_model(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "full", method="full", lr=0.003)
    assert result.trainable == result.total
    assert result.after["bits_per_byte"] < result.before["bits_per_byte"]
    assert result.adapter_dir is None
    assert not (tmp_path / "full" / "adapter").exists()
    trained, base = load(result.model_dir), load(place / "model")
    frozen = [n for n, p in trained.named_parameters() if torch.equal(p, base.get_parameter(n))]
    assert not frozen


def test_gradient_checkpointing_changes_nothing_but_memory(place: Path, tmp_path: Path) -> None:
    losses = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        run(
            place, tmp_path / name, steps=3, lora_dropout=0.2,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([r["loss"] for r in records if r["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_multiple_choice_is_evaluated_by_accuracy(place: Path, tmp_path: Path) -> None:
    rows = [
        {"context": f"Number {i} is", "choices": ["even", "odd"], "label": i % 2} for i in range(40)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    result = run(place, tmp_path / "choice", data=str(data), steps=3, draws=True)
    assert 0 <= result.after["acc"] <= 1
    assert "held-out accuracy" in str(result)
    assert (tmp_path / "choice" / "loss.png").exists()


def test_epochs_count_the_data(place: Path, tmp_path: Path) -> None:
    one = run(place, tmp_path / "one", steps=None, epochs=0.25, grad_accumulation=2)
    texts = load_documents(place / "text.txt").train
    # One token a byte, and EOS after each text.
    n_windows = math.ceil(sum(len(str(text)) + 1 for text in texts) / 32)
    assert one.steps == math.ceil(math.ceil(0.25 * math.ceil(n_windows / 4)) / 2)


def test_a_wrong_merge_is_found(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        from prodial_kernels import remove_prodial

        return remove_prodial(model)

    monkeypatch.setattr(finetuning, "merge_prodial", wrong)
    with pytest.raises(MergeError, match="does not compute what was trained"):
        run(place, tmp_path / "run", steps=5)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert not [p.name for p in (tmp_path / "run").iterdir() if "merged" in p.name]
