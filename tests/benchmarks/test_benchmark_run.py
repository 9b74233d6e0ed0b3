"""The command and the pytest-benchmark suite, in their tiny mode on a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.harness.environment import ROOT
from benchmarks.harness.task import line_of, message_of
from benchmarks.jobs import PARTS, Wanted, plan
from benchmarks.projector.cases import GROUPS, TABLE_SHAPES, Case
from benchmarks.projector.rivals import RIVALS
from benchmarks.projector.rows import ProjectorRow
from benchmarks.projector.scaling import SWEEPS
from benchmarks.projector.shapes import MODELS


def test_the_command_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tiny", "--level", "projector", "--only", "prodial,concat,lora"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| prodial " in printed
    assert "| 16,24,40,16 |" in printed
    assert "time in M" in printed
    record = json.loads((tmp_path / "projector-only.json").read_text())
    names = {part: [] for part in ("table", "variants", "scaling")}
    for row in record["rows"]:
        names[row["part"]].append(row["rival"])
    assert names["table"] == ["frozen", "prodial", "concat", "lora"]
    assert names["variants"] == ["frozen", "prodial"]
    # One case; the others of the sweeps are the table's and the variants'.
    assert names["scaling"] == ["frozen", "prodial", "concat", "lora"]
    assert all(row["status"] == "ok" for row in record["rows"])
    first = record["rows"][1]
    for figure in ("both_us", "forward_us", "eager_us", "host_us", "ratio", "tflops", "gbps",
                   "roofline_fraction", "kept_mib", "output_error", "kernels_us"):  # fmt: skip
        assert first[figure], figure
    assert "peak_mib" not in first
    assert record["dropped"] == []
    environment = record["environment"]
    assert environment["command"].startswith("python -m benchmarks.run --tiny")
    assert environment["versions"]["torch"]
    assert len(environment["sources"]) == 64
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert suffixes == {".json", ".csv", ".md", ".png"}
    page = (tmp_path / "projector-only.md").read_text()
    assert "| 16,24,40 P=12 r=16 | prodial" in page

    assert run.main(["--print", str(tmp_path / "projector-only.json")]) == 0
    assert capsys.readouterr().out == page


def test_what_does_not_fit_is_dropped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tiny", "--level", "projector", "--only", "prodial", "--budget", "1"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    assert "dropped, as the time was over: table 16,24,40" in capsys.readouterr().out
    record = json.loads((tmp_path / "projector-only.json").read_text())
    assert record["rows"] == []
    assert len(record["dropped"]) == 4


def test_a_run_that_is_cut_off_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_job = run.report.of_job

    def cut_off(part: str, rows: list[ProjectorRow], **options: bool) -> str:
        if part == "variants":
            raise KeyboardInterrupt
        return of_job(part, rows, **options)

    monkeypatch.setattr(run.report, "of_job", cut_off)
    options = ["--tiny", "--level", "projector", "--only", "prodial", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        run.main(options)
    assert "| 16,24,40,16 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "projector-only.json").read_text())
    assert [row["part"] for row in record["rows"]] == ["table"] * 2 + ["variants"] * 2
    assert [name.split()[0] for name in record["dropped"]] == ["scaling", "breakdown"]
    assert "| 16,24,40,16 |" in (tmp_path / "projector-only.md").read_text()


@pytest.mark.parametrize(
    ("options", "title", "grows"),
    [
        (["--level", "step", "--scaling"], "step mamba-130m 1×8 float32, 2 layers", True),
        (["--level", "mixer", "--model", "mamba2-130m"], "mixer mamba2-130m 1×8 float32", False),
    ],
    ids=["layers", "mixer"],
)
def test_levels_above_the_projector(
    options: list[str],
    title: str,
    grows: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--tiny", *options, "--only", "prodial", "--output", str(tmp_path)]
    assert run.main(options) == 0
    printed = capsys.readouterr().out
    assert title in printed
    assert "| prodial" in printed
    assert ("busy time in layers" in printed) is grows


def test_the_whole_plan() -> None:
    jobs = plan(Wanted())
    parts = [job.part for job in jobs]
    assert sorted(parts, key=PARTS.index) == parts
    assert set(parts) == set(PARTS)
    table = [job for job in jobs if job.part == "table"]
    assert [job.case for job in table] == list(TABLE_SHAPES)
    assert all(len(job.rivals) == len(RIVALS) for job in table)
    assert len(set(jobs)) == len({str(job) for job in jobs}) == len(jobs)
    swept = [case for cases in SWEEPS.values() for case in cases]
    measured = {job.case.key for job in jobs if isinstance(job.case, Case)}
    assert {case.key for case in swept} <= measured
    assert [job.case.depth for job in jobs if job.part == "step"] == [24, 1, 6, 12]
    assert all(message_of(line_of(job)) == job for job in jobs)


def test_a_quick_plan_is_the_table_against_the_strongest() -> None:
    jobs = plan(Wanted(quick=True))
    assert {job.part for job in jobs} == {"table", "variants"}
    assert jobs[0].rivals == ("frozen", "prodial", "concat", "materialised-compiled")
    assert plan(Wanted(model="mamba2-2.7b", only=("prodial",)))[0].case.n == 10576


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_its_cases_against_every_rival(group: str) -> None:
    jobs = plan(Wanted(group=group))
    table = [job for job in jobs if job.part == "table"]
    assert [job.case for job in table] == list(GROUPS[group])
    assert all(len(job.rivals) == len(RIVALS) for job in table)
    assert {job.part for job in jobs} == {"table", "breakdown"}
    # By a model's own arithmetic, where it is listed.
    for case in GROUPS[group]:
        model, which = case.model.split()
        if model in MODELS:
            assert getattr(MODELS[model], which) == (case.k, case.n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny"], "--tiny needs --output"),
        (["--tiny", "--output", "x", "--only", "nonsense"], "got nonsense"),
        (["--tiny", "--output", "x", "--base", "no-such-reference"], "expected a git reference"),
        (["--tiny", "--output", "x", "--level", "step", "--model", "vim-tiny"], "takes a mamba-"),
        (["--tiny", "--output", "x", "--level", "step", "--only", "peft-lora"], "got peft-lora"),
        (["--tiny", "--output", "x", "--level", "mixer", "--scaling"], "no layers to add"),
        (["--print", "/nonexistent.json"], "/nonexistent.json"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_pytest_benchmark_runs_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # pytest-benchmark switches itself off in what looks like a worker of pytest-xdist.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    for more in ("--benchmark-autosave", "--benchmark-compare"):
        options = [
            "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
            f"--benchmark-storage={tmp_path}", "-k", "frozen or prodial", more,
        ]  # fmt: skip
        code = pytest.main(options)
        printed = capsys.readouterr().out
        assert code == 0, printed
        assert "4 passed" in printed
    assert "(NOW)" in printed
