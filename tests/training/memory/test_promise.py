"""Planned peaks beside measured ones: which runs, what is kept, and the command on tiny models."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.training import promise
from benchmarks.training.promise import CASES, MIB, TINY_CASES, Case, Row
from benchmarks.training.sizes import SIZES, transformers_config
from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.loading.quantized import model_on_meta
from prodial_kernels.training.memory.peak import Job
from prodial_kernels.training.memory.plan import plan_memory
from prodial_kernels.training.memory.shapes import describe_model
from prodial_kernels.training.step.chunked_loss import chunk_rows

GB = 10**9


def test_the_runs_cover_every_family_level_and_format() -> None:
    assert len({str(case) for case in CASES}) == len(CASES) >= 60
    families = {SIZES[case.model].family for case in CASES}
    assert families == {
        "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "bamba", "zamba2", "falcon_h1",
        "granitemoehybrid", "nemotron_h",
    }  # fmt: skip
    assert {case.format for case in CASES} == {None, "nf4", "int8", "fp8"}
    assert {case.activations for case in CASES} >= {"auto", "keep", "checkpoint", "offload"}
    assert {case.experts for case in CASES} == {"device", "host"}
    assert {case.graph for case in CASES} == {True, False}
    assert any(case.budget is not None for case in CASES)


@pytest.mark.parametrize(
    ("predicted", "measured", "error", "kept"),
    [
        (GB, GB + 31 * MIB, "", True),
        (GB, GB - 33 * MIB, "", False),
        (10 * GB, int(10.19 * GB), "", True),
        (10 * GB, int(10.21 * GB), "", False),
        (GB, 0, "OutOfMemoryError: x", False),
    ],
)
def test_what_is_promised(predicted: int, measured: int, error: str, kept: bool) -> None:
    row = Row("a", {}, predicted=predicted, measured=measured, error=error)
    assert row.kept is kept
    assert ("BROKEN" in str(row) or "FAILED" in str(row)) is not kept


def test_the_page_counts_and_draws(tmp_path: Path) -> None:
    rows = [
        Row("a", {"keep": 2}, "in an evaluation", predicted=GB, measured=GB + GB // 1000),
        Row("b", {"keep": 2}, predicted=GB, measured=int(1.05 * GB), limit=2 * GB),
        Row("c", {"keep": 2}, predicted=GB, error="OutOfMemoryError: x"),
    ]
    record = {
        "device": "GPU", "date": "2026-11-30", "command": "python …", "notes": ["Two were late."],
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    }  # fmt: skip
    text = promise.page(rows, record)
    assert "Two were late." in text
    assert (
        "3 runs on an GPU, 2026-11-30, 1 of them within 2% or 32 MiB of the plan; 1 failed" in text
    )
    assert " +0.0%  █ 1\n +5.0%  █ 1" in text
    assert "OutOfMemoryError: x" in text
    file = tmp_path / "promise.jsonl"
    newer = replace(rows[1], measured=GB)
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in (*rows, newer)))
    assert [row.kept for row in promise.read_rows(file)] == [True, True, False]
    assert promise.read_rows(tmp_path / "none") == []
    (tmp_path / "promise.json").write_text(json.dumps(record))
    assert promise.main(["--page", "--output", str(tmp_path)]) == 1
    assert "2 of them within" in (tmp_path / "promise.md").read_text()


def test_tiny_models_are_run_and_left_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "promise.jsonl"
    own = [case for case in TINY_CASES if case.model == "tiny"]
    budget = Case("tiny", None, "projectors", 2, 32, budget=0.5)
    promise.run_group([*own, budget], file, time.time() + 60, tiny=True)
    rows = {row.case: row for row in promise.read_rows(file)}
    assert {case: bool(row.error) for case, row in rows.items()} == {
        str(own[0]): False, str(own[1]): False, str(budget): True,
    }  # fmt: skip
    assert "nothing is planned here" in rows[str(budget)].error
    # Late: nothing more is begun.
    promise.run_group(own, file, time.time() - 1, tiny=True)
    assert len(file.read_text().splitlines()) == 3


def test_room_is_taken_and_given_back(tmp_path: Path) -> None:
    (tmp_path / "1.room").write_text("50")
    with promise.room(tmp_path, 60, 100, time.time() - 1) as there:
        assert not there
    with promise.room(tmp_path, 40, 100, time.time() - 1) as there:
        assert there
        assert len(list(tmp_path.glob("*.room"))) == 2
    (tmp_path / "1.room").unlink()
    # What is more than there is runs alone.
    with promise.room(tmp_path, 600, 100, time.time() - 1) as there:
        assert there


@pytest.mark.parametrize(
    ("model", "batch", "length", "level", "measured"),
    [
        ("zamba-7b", 1, 1024, "keep", 17_468),
        ("zamba2-7b", 1, 1024, "keep", 11_002),
        ("zamba2-7b", 1, 2048, "offload", 5_015),
        ("jamba-52b", 1, 1024, "checkpoint", 26_614),
        ("falcon-h1-7b", 1, 1024, "keep", 9_800),
    ],
)
def test_peaks_that_an_h200_has_shown(
    model: str, batch: int, length: int, level: str, measured: int
) -> None:
    """MiB of whole runs, everything in NF4; bf16, r = 16, torch 2.11, 2026-11-30."""
    empty = model_on_meta(transformers_config(model), torch.bfloat16)
    apply_prodial(empty, ProdialConfig(r=16))
    fuse_norms(empty)
    shape = describe_model(empty, kernels=True)
    rows = chunk_rows(shape.vocabulary, torch.bfloat16, torch.device("cuda"))
    job = Job(batch, length, quantize="nf4", quantize_modules="all", loss_rows=rows)
    plan = plan_memory(shape, job, budget=None, activations=level)
    assert Row("", {}, predicted=plan.peak.total, measured=measured * MIB).kept, str(plan)
