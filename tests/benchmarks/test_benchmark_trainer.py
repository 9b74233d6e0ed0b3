"""The benchmark in transformers' Trainer: a tiny run on a CPU, and what a row must keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import trainer
from benchmarks.models.rows import ModelRow
from benchmarks.training.trainer_steps import (
    CONFIGS,
    TINY_CONFIGS,
    VARIANTS,
    Settings,
    build,
    profiled,
)

# What PEFT asks of transformers under an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "trainer.json"
    options = ["--tiny", "--output", str(output), "--models", "mamba2-130m"]
    assert trainer.main(options) == 0
    record = json.loads(output.read_text())
    assert record["command"].startswith("python -m benchmarks.trainer --tiny")
    assert record["date"]
    assert record["versions"]["transformers"]
    assert record["dropped"] == []
    statuses = {row["variant"]: row["status"] for row in record["rows"]}
    assert list(statuses) == list(VARIANTS)
    assert statuses.pop("captured").startswith("unavailable")
    assert set(statuses.values()) == {"ok"}
    assert all(row["ms"] > 0 for row in record["rows"] if row["status"] == "ok")
    assert "1.00x" in capsys.readouterr().out


def test_a_profile_is_of_the_steps_only(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(device="cpu", warm_up=1, steps=1, tiny=True)
    text = profiled("mamba2-130m", 2, 8, "frozen", settings)
    assert text.startswith("host, 1 steps")
    assert "training_step" in text
    assert "import_structure" not in text


def test_what_runs_out_of_time_is_named(tmp_path: Path, capsys: Any) -> None:
    options = ["--tiny", "--output", str(tmp_path / "trainer.json"), "--budget", "-1"]
    assert trainer.main([*options, "--models", "mamba-130m"]) == 0
    assert "dropped, as the time was over: mamba-130m 2 16 frozen; " in capsys.readouterr().out


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainer.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert trainer.main(["--tiny"]) == 2
    assert "--tiny needs --output" in capsys.readouterr().err


def test_unfused_lora_trains_both_projectors_and_fused_one() -> None:
    settings = Settings(device="cpu", tiny=True)
    assert TINY_CONFIGS.keys() == CONFIGS.keys()
    for variant, trained in (
        ("lora-unfused", {"in_proj", "out_proj"}),
        ("lora-fused", {"in_proj"}),
    ):
        model, callbacks = build("mamba2-130m", variant, settings)
        assert not callbacks
        ids = torch.ones(1, 4, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
        assert {name.split(".lora_")[0].split(".")[-1] for name in with_gradient} == trained


def row(
    variant: str, ms: float, peak: float, *, length: int = 512, model: str = "mamba"
) -> ModelRow:
    memory = {"peak_mib": peak, "reserved_mib": peak}
    return ModelRow(f"{model}-130m", 4 if length == 512 else 8, length, variant, "ok", ms, **memory)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([row("prodial", 90, 10), row("captured", 24, 10)], True),
        ([row("prodial", 90, 10), row("captured", 24.1, 10)], False),
        ([row("prodial", 90, 10), row("captured", 20, 10.1)], False),
        ([row("frozen", 100, 9, length=2048), row("captured", 85, 9, length=2048)], True),
        ([row("frozen", 100, 9, length=2048), row("captured", 86, 9, length=2048)], False),
        ([row("lora-fused", 100, 9, model="mamba2"), row("lora-unfused", 80, 9, model="mamba2"),
          row("captured", 28, 9, model="mamba2")], True),
        ([row("lora-fused", 100, 9, model="mamba2"), row("lora-unfused", 80, 9, model="mamba2"),
          row("captured", 29, 9, model="mamba2")], False),
    ],
)  # fmt: skip
def test_what_captured_rows_must_keep(rows: list[ModelRow], kept: bool) -> None:
    trainer.judge(rows)
    last = rows[-1]
    assert last.ok is kept
    assert ("MISSED" in str(last)) is not kept
