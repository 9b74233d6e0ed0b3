"""The fine-tuning benchmark in its tiny mode: its jobs, its limits, its curves."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import finetune
from benchmarks.harness.process import WorkerError
from benchmarks.harness.rows import values_of
from benchmarks.training.jobs import (
    FROZEN,
    GB,
    JOBS,
    LEAST,
    MORE_JOBS,
    PEFT,
    SIZES,
    TINY_JOBS,
    WHOLE_JOBS,
    Job,
    JobRow,
)
from benchmarks.training.learning import curves
from benchmarks.training.learning.in_fp8 import METHODS, LearningRow, runs_of, summary
from benchmarks.training.steps import LR, JobTask, plan_of
from benchmarks.training.table import beside_rivals
from prodial_kernels.cli import commands
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.config import ConfigError, FinetuneConfig
from prodial_kernels.training.memory import run_plan
from prodial_kernels.training.sizes import parse_budget

CUDA = torch.device("cuda")


@pytest.fixture
def feigned_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 80 GB, as far as a plan asks, with mamba_ssm's kernels."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(run_plan, "kernels_available", lambda: True)


def test_the_jobs_are_those_that_must_fit() -> None:
    names = [job.name for job in (*JOBS, *MORE_JOBS, *WHOLE_JOBS, *TINY_JOBS)]
    assert len(set(names)) == len(names)
    assert all(job.model in SIZES for job in (*JOBS, *WHOLE_JOBS))
    for job in JOBS:
        # What it must keep is what it is given.
        if job.must[1] is not None:
            assert parse_budget(str(job.memory_budget)) == job.must[1] * GB
    with_least = {job.name.removesuffix("-least") for job in JOBS if job.memory_budget == LEAST}
    assert with_least == {job.name for job in JOBS if job.must[1] is not None}


# One of those with the least budget: which that is takes many plans to find out.
@pytest.mark.parametrize(
    "job",
    [
        job
        for job in JOBS
        if job.library == "transformers"
        and (job.memory_budget != LEAST or job.name == "1.4b-nf4-least")
    ],
    ids=lambda job: job.name,
)
def test_the_command_says_what_is_planned(
    job: Job, feigned_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = plan_of(job, CUDA, torch.bfloat16)
    assert run is not None
    assert run.plan.fits
    budget = config.memory_budget
    if job.memory_budget == LEAST:
        # 0.1 GB less is too little.
        less = {"memory_budget": f"{float(str(budget).removesuffix('GB')) - 0.1:.1f}GB"}
        with pytest.raises(run_plan.MemoryPlanError):
            plan_of(replace(job, **less), CUDA, torch.bfloat16)
    given: list[FinetuneConfig] = []

    def parsed(args: Any) -> int:
        given.append(FinetuneConfig.from_dict(commands.options.config_values(args)).resolved())
        return 0

    monkeypatch.setitem(
        commands.COMMANDS, "finetune", commands.COMMANDS["finetune"]._replace(run=parsed)
    )  # fmt: skip
    command = job.command(budget)
    assert command is not None
    assert commands.main(shlex.split(command)[1:]) == 0
    expected = replace(
        config, model=SIZES[job.model].published, data="notes.txt", lr=given[0].lr,
        max_bytes=None, eval_tokens=None,
    )  # fmt: skip
    assert given == [expected]


@pytest.mark.parametrize("job", TINY_JOBS, ids=lambda job: job.name)
def test_a_row_is_measured(job: Job) -> None:
    ready = JobTask(job, 2, profile=job.name == "tiny").prepare("cpu", nullcontext())
    model = ready.training.model
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    before = [p.detach().clone() for p in model.parameters()]
    (row,) = ready.measure()
    moved = [
        float((p.detach() - was).abs().max())
        for p, was in zip(model.parameters(), before, strict=True)
    ]
    # The adapter moves, and little: AdamW's steps, two of them timed.
    assert 0 < max(moved) < (6 if row.kernels_us else 4) * LR
    assert bool(row.kernels_us) is (job.name == "tiny")
    assert row.ms > 0
    assert row.peak_bytes is row.predicted_bytes is None
    assert row.how == "steps launched one by one"
    assert not row.graphed
    assert row.levels == {"keep" if job.activations == "auto" else job.activations: 4}
    # Two projectors a mixer; of everything the attention, a shared expert and the head beside.
    number = 2 * SIZES["tiny"].layers if job.quantize else 0
    assert len(layers) == (2 * 2 + 4 + 2 + 1 if job.quantize_modules == "all" else number)
    assert row.command.startswith("prodial finetune --model embedded --data notes.txt")
    assert JobRow(**json.loads(json.dumps(values_of(row)))).title == row.title


@pytest.mark.parametrize(
    "rival", [*TINY_JOBS[1].rivals(), *TINY_JOBS[2].rivals()], ids=lambda job: job.name
)
def test_a_rival_is_measured(rival: Job) -> None:
    if rival.method == PEFT:
        pytest.importorskip("peft")
        pytest.importorskip("bitsandbytes")
    ready = JobTask(rival, 1).prepare("cpu", nullcontext())
    model = ready.training.model
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    (row,) = ready.measure()
    moved = [n for n, p in model.named_parameters() if n in trained and (p != trained[n]).any()]
    assert (row.method, row.command, row.predicted_bytes) == (rival.method, None, None)
    assert rival.title.endswith(", frozen" if rival.method == FROZEN else ", PEFT")
    if rival.method == FROZEN:
        # All of the gradient has come to where the model begins.
        assert len(moved) == row.trained // SIZES[rival.model].width == 1
        return
    mixers = 4 if rival.model == "tiny" else 2
    assert len(trained) == 2 * 2 * mixers
    # A is behind a B of 0 in the first step, and adapters of out_proj move too.
    assert {name for name in trained if "lora_B" in name} <= set(moved)
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) >= 2 * mixers


def test_tokens_a_second_beside_the_rivals() -> None:
    rows = [
        JobRow("a", batch=2, length=500, ms=100.0),
        JobRow("a+frozen", batch=2, length=500, ms=95.0, method=FROZEN, peak_bytes=2 * 10**9),
        JobRow("a+peft", batch=2, length=500, ms=250.0, method=PEFT),
        JobRow("b", batch=1, length=1, ms=1.0),
        JobRow("b+peft", method=PEFT, error="no memory"),
    ]
    assert beside_rivals(rows) == [
        "a                      10,000 tokens/s, 0.95 of frozen (10,526; 2.00 GB), "
        "2.50 of peft (4,000; –)"
    ]


def test_a_job_that_cannot_be_is_a_row_with_the_reason() -> None:
    task = JobTask(TINY_JOBS[0], 1, loss="fast")
    with pytest.raises(ConfigError, match="must be one of"):
        task.prepare("cpu", nullcontext())
    assert task.rows("no memory") == [JobRow("tiny", error="no memory")]


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
    row = JobRow("a", ms=ms, peak_bytes=None if gb is None else round(gb * GB), must=must)
    assert row.ok is kept
    assert not replace(row, error="no memory").ok


def test_rows_as_text() -> None:
    row = JobRow(
        "a", title="m 1×2 nf4", ms=12.5, peak_bytes=5_000_000_000, must=[20, 6],
        aim=[10, 4], how="graphed", library="mamba_ssm", predicted_bytes=5_250_000_000,
        memory_budget="6GB", levels={"checkpoint": 3, "keep": 1},
    )  # fmt: skip
    text = finetune.row_text(row)
    assert "12.50 ms" in text
    assert "5.00 GB (5.25)" in text
    assert "must    20 ms    6 GB  aim    10 ms    4 GB  ok     mamba_ssm, budget 6GB" in text
    assert text.endswith("budget 6GB, 1 `keep`, 3 `checkpoint`; graphed")
    assert "5.00 GB  must" in finetune.row_text(replace(row, predicted_bytes=None))
    assert "MISSED" in finetune.row_text(replace(row, ms=21))
    small = {"ms": 9, "peak_bytes": 3_000_000_000}
    assert "4 GB  aim " in finetune.row_text(replace(row, **small))
    unlimited = replace(row, must=[None, None])
    assert "ok " not in finetune.row_text(unlimited)
    assert "4 GB  aim " in finetune.row_text(replace(unlimited, **small))
    assert "FAILED: no memory" in finetune.row_text(JobRow("a", error="no memory"))


def test_a_missed_row_or_a_failed_job_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = JobRow("tiny", levels={"keep": 4}, ms=1.0, must=(1e-9, 8), kernels_us={"gemm": 900.0})
    done: list[str] = []

    class Fake:
        def __init__(self, device: str, load: list[str]) -> None:
            assert device == "cpu"
            assert "mamba_ssm" not in load

        def ask(self, do: str, number: int = 0, task: JobTask | None = None) -> None:
            self.job = task.job if task else self.job
            done.append(do)

        def prepared(self, timeout_s: float | None) -> None:
            done.append("wait")
            if self.job.name in failing:
                raise WorkerError("out of memory")

        def answer(self, timeout_s: float | None) -> dict[str, list[JobRow]]:
            limits.append(timeout_s)
            if self.job.name != "tiny":
                raise WorkerError("it ended")
            return {"rows": [row]}

        def kill(self) -> None:
            done.append("end")

        def close(self) -> None: ...

    failing: list[str] = []
    limits: list[float | None] = []

    def run(arguments: list[str]) -> int:
        return finetune.main(arguments, Fake)  # type: ignore[arg-type]

    assert run(["--tiny", "--jobs", "tiny", "--output", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "finetune.json").read_text())
    assert written["rows"][0]["name"] == "tiny"
    assert written["command"] == "python -m benchmarks.finetune --tiny --jobs tiny"
    assert {"device", "versions", "date", "commit"} <= written.keys()
    row.must = (None, None)
    assert run(["--tiny", "--jobs", "tiny"]) == 0
    assert "0.900  gemm" in capsys.readouterr().out
    failing.append("tiny")
    assert run(["--tiny", "--jobs", "tiny"]) == 1
    assert "tiny                   FAILED: out of memory" in capsys.readouterr().out
    failing.clear()
    done.clear()
    assert run(["--tiny"]) == 1
    # Nothing is measured while another job is prepared.
    number = len(TINY_JOBS)
    every = ["prepare"] * number + ["wait"] * number + ["measure", "end"] * number
    assert done == every
    assert "tiny-nf4               FAILED: it ended" in capsys.readouterr().out
    done.clear()
    assert run(["--tiny", "--side-by-side", "1"]) == 1
    assert done == ["prepare", "wait", "measure", "end"] * number
    assert set(limits) == {None}
    done.clear()
    assert run(["--tiny", "--jobs", "tiny", "--rivals", "--seconds", "60"]) == 1
    assert done.count("measure") == 3
    assert 50 < (limits[-1] or 0) < 60
    assert "tiny+peft              FAILED: it ended" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown jobs"):
        run(["--tiny", "--jobs", "1.4b-bf16"])


def test_curves_are_compared_with_another_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"plain": [3.0, 2.0], "control": [3.0, 2.001], "graph": [3.0, 2.0015]}
    losses |= {"checkpoint": [3.0, 2.005], "nf4": [4.0, 3.0]}
    monkeypatch.setattr(
        curves, "losses_of",
        lambda maker, variant, device, steps: losses.get(variant.name, losses["plain"]),
    )  # fmt: skip
    rows, good = curves.run_curves("cuda", 2)
    assert not good
    verdicts = {row.variant: row.ok for row in rows}
    assert [name for name, ok in verdicts.items() if not ok] == ["checkpoint"]
    assert len(rows) == 2 * (1 + len(curves.variants_on("cuda")))
    del losses["checkpoint"]
    assert curves.run_curves("cuda", 2)[1]


def test_a_curve_that_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = ["nf4"]

    def losses_of(maker: str, variant: curves.Variant, device: str, steps: int) -> list[float]:
        if variant.name in broken:
            raise RuntimeError("no kernel")
        return [3.0, 2.0]

    monkeypatch.setattr(curves, "losses_of", losses_of)
    rows, good = curves.run_curves("cpu", 2, ["embedded"])
    assert not good
    assert [row.ok for row in rows] == [True] * (len(rows) - 1) + [False]
    assert rows[-1].error == "RuntimeError: no kernel"
    assert "embedded nf4            FAILED: RuntimeError: no kernel" in capsys.readouterr().out
    broken.append("control")
    rows, good = curves.run_curves("cpu", 2, ["embedded"])
    assert not good
    assert [row.variant for row in rows] == ["plain", "control"]


def test_what_noise_is_measured_with_is_no_saving() -> None:
    """A graph that computed something else would widen what graphs are judged by."""
    assert not curves.PLAIN.graphed
    assert not curves.CONTROL.graphed
    assert curves.VARIANTS[0] == curves.CONTROL
    on_a_cpu = curves.variants_on("cpu")
    assert not any(variant.graphed for variant in on_a_cpu)
    assert {"graph", "liger loss"}.isdisjoint(variant.name for variant in on_a_cpu)


def test_a_curve_is_trained() -> None:
    plain = curves.losses_of("random-130m", curves.PLAIN, "cpu", 2)
    saving = curves.Variant("x", "chunked", "checkpoint", graphed=False, parts=2)
    assert plain == pytest.approx(curves.losses_of("random-130m", saving, "cpu", 2), rel=1e-5)
    assert plain[0] != plain[1]
    # Each run trains a copy.
    assert curves.losses_of("random-130m", curves.PLAIN, "cpu", 2) == plain


def test_learning_in_fp8_is_judged_by_the_spread_of_seeds() -> None:
    """A gap below the seeds' spread is within it, a larger one is not; one seed says nothing."""

    def rows(gap: float, seeds: int = 3) -> list[LearningRow]:
        return [
            LearningRow(method, seed, compute, [(10, 2 + seed + (compute == "fp8") * gap)])
            for method in METHODS for compute in ("same", "fp8") for seed in range(seeds)
        ]  # fmt: skip

    lines, good = summary(rows(0.9))
    assert good
    assert "+0.9000" in lines[0]
    assert not summary(rows(1.1))[1]
    assert not summary(rows(0.0, seeds=1))[1]
    lost = rows(0.0)
    lost[3].error = "TimeoutError"
    assert "over 2 seeds" in summary(lost)[0][0]
    assert "lowest" not in lines[0]
    risen = rows(0.0)
    for row in risen:
        row.held_out.insert(0, (5, 1 + row.seed / 10 + (row.compute == "fp8") * 0.5))
    assert "after 5 steps: 1.1000 ± 0.1000 in 16 bits, by seed +0.5000" in summary(risen)[0][0]


def test_learning_in_fp8_takes_each_seed_in_pairs() -> None:
    runs = runs_of(2)
    assert [(r.seed, r.compute) for r in runs[:4]] == [(0, "same"), (0, "fp8")] * 2
    assert len(set(runs)) == 12
