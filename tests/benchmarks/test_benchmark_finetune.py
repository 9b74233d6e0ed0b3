"""The fine-tuning benchmark in its tiny mode: its jobs, its limits, its curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import curves, finetune, finetune_jobs
from benchmarks.finetune_jobs import (
    JOBS,
    MODELS,
    TINY_JOBS,
    Job,
    build,
    keeps,
    make_batches,
    make_step,
    measure,
)
from prodial_kernels.quantization import QuantizedLinear

NF4 = TINY_JOBS[1]


def test_the_jobs_are_those_that_must_fit() -> None:
    limits = {job.name: (job.must, job.aim) for job in JOBS}
    assert limits["1.4b-bf16"] == ((350, 8), (300, 6))
    assert limits["1.4b-nf4"] == ((380, 5.5), (320, 4))
    assert limits["2.8b-nf4"] == ((None, 6), (None, 4))
    assert limits["7b-nf4"] == ((None, 11), (None, 8))
    assert limits["130m-graphed"] == ((16, None), (14, None))
    assert limits["1.4b-graphed"] == ((78, None), (65, None))
    assert len(limits) == len(JOBS)
    assert {job.model for job in JOBS} <= MODELS.keys()


def test_a_row_is_measured() -> None:
    row = measure(NF4, "cpu", steps=2)
    assert row["ms"] > 0
    assert row["peak_bytes"] is None
    assert row["how"] == "eager, chunked loss, adamw"
    json.dumps(row)


def test_random_codes_stand_for_weights_of_the_usual_size() -> None:
    dense, quantised = build(TINY_JOBS[0], "cpu"), build(NF4, "cpu")
    layers = [m for m in quantised.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * MODELS["tiny"].layers
    for layer in layers:
        rms = float(layer.dequantize().square().mean().sqrt())
        assert rms == pytest.approx(0.5 * layer.in_features**-0.5, rel=0.15)
    trained = [
        sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (dense, quantised)
    ]
    assert trained[0] == trained[1] > 0


@pytest.mark.parametrize("segment", [1, 3])
def test_segments_compute_the_same_and_keep_less(segment: int) -> None:
    def step(job: Job) -> tuple[Any, dict[str, torch.Tensor], int]:
        model = build(job, "cpu")
        taken, _ = make_step(model, job, "cpu", loss="full")
        kept: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            taken.begin([make_batches(job).batch(0)], 1e-3)
        gradients = {
            name.split("mixer.")[-1] + str(index): parameter.grad.clone()
            for index, (name, parameter) in enumerate(model.named_parameters())
            if parameter.grad is not None
        }
        return taken.finish(), gradients, len(kept)

    job = TINY_JOBS[0]
    result, gradients, kept = step(job)
    recomputed, others, left = step(Job("x", "tiny", job.batch, job.length, segment=segment))
    assert recomputed == result
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient)
    assert left < kept


@pytest.mark.parametrize(
    ("ms", "gb", "must", "kept"),
    [
        (349, 7.9, (350, 8), True),
        (351, 7.9, (350, 8), False),
        (349, 8.1, (350, 8), False),
        (999, 7.9, (None, 8), True),
        (349, None, (350, 8), True),
    ],
)
def test_limits(ms: float, gb: float | None, must: Any, kept: bool) -> None:
    row = {"ms": ms, "peak_bytes": None if gb is None else gb * 1e9}
    assert keeps(row, must) is kept


def test_rows_as_text() -> None:
    row = {
        "name": "a", "title": "m 1×2 nf4", "ms": 12.5, "peak_bytes": 5e9, "must": [20, 6],
        "aim": [10, 4], "how": "graphed", "library": "mamba_ssm",
    }  # fmt: skip
    text = finetune.row_text(row)
    assert "12.50 ms" in text
    assert "5.00 GB ( 4.66 GiB)" in text
    assert "must    20 ms    6 GB  aim    10 ms    4 GB  ok     mamba_ssm, graphed" in text
    assert "MISSED" in finetune.row_text({**row, "ms": 21})
    assert "4 GB  aim " in finetune.row_text({**row, "ms": 9, "peak_bytes": 3e9})
    assert "FAILED: no memory" in finetune.row_text({"name": "a", "error": "no memory"})


def test_a_missed_row_or_a_failed_job_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {**measure(TINY_JOBS[0], "cpu", steps=1), "must": (1e-9, 8)}

    class Child:
        def __init__(self, arguments: list[str]) -> None:
            self.name = arguments[1]

        def measure(self) -> dict[str, Any]:
            return dict(row) if self.name == "tiny" else {"error": "out of memory"}

        def end(self) -> None:
            pass

    monkeypatch.setattr(finetune, "Child", Child)
    assert finetune.main(["--tiny", "--jobs", "tiny", "--output", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "finetune.json").read_text())
    assert written["rows"][0]["name"] == "tiny"
    assert written["command"].startswith("python -m benchmarks.finetune --tiny --jobs tiny")
    assert {"device", "versions", "date", "commit"} <= written.keys()
    row["must"] = (None, None)
    assert finetune.main(["--tiny", "--jobs", "tiny"]) == 0
    assert finetune.main(["--tiny"]) == 1
    with pytest.raises(SystemExit, match="unknown jobs"):
        finetune.main(["--tiny", "--jobs", "1.4b-bf16"])


def test_a_process_that_fails_says_why() -> None:
    child = finetune.Child(["--child", "tiny", "--tiny", "--loss", "fast"])
    try:
        error = child.measure()["error"]
    finally:
        child.end()
    assert "exit code 1" in error
    assert "got 'fast'" in error


def test_curves_are_compared_with_another_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"plain": [3.0, 2.0], "control": [3.0, 2.001], "graph": [3.0, 2.003]}
    losses |= {"checkpointing": [3.0, 2.005], "nf4": [4.0, 3.0]}
    monkeypatch.setattr(
        curves, "losses_of",
        lambda maker, variant, device, steps: losses.get(variant.name, losses["plain"]),
    )  # fmt: skip
    rows, good = curves.run_curves("cuda", 2)
    assert not good
    verdicts = {r["variant"]: r["ok"] for r in rows if r["variant"] != "plain"}
    assert [name for name, ok in verdicts.items() if not ok] == ["checkpointing"]
    assert len(rows) == 2 * (1 + len(curves.VARIANTS))
    del losses["checkpointing"]
    assert curves.run_curves("cuda", 2)[1]


def test_a_curve_is_trained() -> None:
    plain = curves.losses_of("random-130m", curves.PLAIN, "cpu", 2)
    saved = curves.losses_of(
        "random-130m", curves.Variant("x", "chunked", segment=2, parts=2), "cpu", 2
    )
    assert plain == pytest.approx(saved, rel=1e-5)
    assert finetune_jobs.MODELS["tiny"].layers == 4
