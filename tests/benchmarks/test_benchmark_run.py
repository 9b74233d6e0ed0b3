"""The command and the pytest-benchmark suite, in their tiny mode on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.environment import ROOT


def test_the_command_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--tiny", "--output", str(tmp_path), "--only", "prodial,concat,lora"]) == 0
    printed = capsys.readouterr().out
    assert "| prodial " in printed
    assert "| 16,24,40 |" in printed
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    names = [row["rival"] for row in record["rows"]]
    assert names == ["frozen", "prodial", "concat", "lora", "frozen", "prodial"]
    assert all(row["status"] == "ok" for row in record["rows"])
    first = record["rows"][1]
    for figure in ("both_us", "forward_us", "eager_us", "host_us", "ratio", "tflops", "gbps",
                   "roofline_fraction", "kept_mib", "output_error", "kernels_us"):  # fmt: skip
        assert first[figure], figure
    assert first["peak_mib"] is None
    environment = record["environment"]
    assert environment["command"].startswith("python -m benchmarks.run --tiny")
    assert environment["versions"]["torch"]
    assert len(environment["sources"]) == 64
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".png"}

    assert run.main(["--load", str(path), "--table", "--output", str(tmp_path / "again")]) == 0
    assert "| 16,24,40 |" in capsys.readouterr().out


def test_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiny", "--scaling", "--only", "prodial", "--output", str(tmp_path)]
    assert run.main(options) == 0
    assert "time in M" in capsys.readouterr().out


def test_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiny", "--level", "step", "--scaling", "--only", "prodial"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1×8 float32, 2 layers" in printed
    assert "busy time in layers" in printed


@pytest.mark.parametrize(("level", "model"), [("mixer", "mamba2-130m"), ("step", "mamba-130m")])
def test_levels_above_the_projector(
    level: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tiny", "--level", level, "--model", model, "--only", "prodial"]
    assert run.main([*options, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "busy time in layers" not in printed
    assert f"{level} {model} 1×8 float32" in printed
    assert "| prodial" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny"], "--tiny needs --output"),
        (["--tiny", "--output", "x", "--only", "nonsense"], "got nonsense"),
        (["--tiny", "--output", "x", "--base", "no-such-reference"], "expected a git reference"),
        (["--tiny", "--output", "x", "--level", "step", "--model", "vim-tiny"], "takes a mamba-"),
        (["--tiny", "--output", "x", "--level", "step", "--only", "peft-lora"], "got peft-lora"),
        (["--tiny", "--output", "x", "--level", "mixer", "--scaling"], "no layers to add"),
        (["--load", "/nonexistent.json"], "/nonexistent.json"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_pytest_benchmark_runs_and_compares(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q",
        "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-storage={tmp_path}",
        "-k", "frozen or prodial",
    ]  # fmt: skip
    # pytest-benchmark switches itself off in what looks like a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    for more in (["--benchmark-autosave"], ["--benchmark-compare"]):
        done = subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 passed" in done.stdout
    assert "(NOW)" in done.stdout
