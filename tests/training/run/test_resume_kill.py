"""A run that is killed without warning, twice, and resumed: the losses of one that never was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.tiny_model import subprocess_environment, write_text, write_tiny_model

_STEPS = 48


def _start(place: Path, output: str, *more: str) -> subprocess.Popen[str]:
    arguments = [
        "finetune", "--model", "model", "--data", "text.txt", "--output", output,
        "--steps", str(_STEPS), "--batch-size", "4", "--seq-len", "48", "--lora-dropout", "0.2",
        "--grad-accumulation", "2", "--eval-every", "12", "--save-every", "7", "--device", "cpu",
        "--keep", "best",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "prodial_kernels", *arguments, *more],
        cwd=place, env=subprocess_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _kill_after(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def _finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error


def _values(metrics: Path) -> list[dict[str, Any]]:
    records = map(json.loads, metrics.read_text().splitlines())
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def test_kill_and_resume_gives_identical_losses(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    metrics = tmp_path / "b" / "metrics.jsonl"
    with _start(tmp_path, "a") as undisturbed:
        try:
            _kill_after(_start(tmp_path, "b"), metrics, 10)
            _kill_after(_start(tmp_path, "b", "--resume"), metrics, 30)
            _finish(_start(tmp_path, "b", "--resume"))
            _finish(undisturbed)
        finally:
            undisturbed.kill()

    expected = _values(tmp_path / "a" / "metrics.jsonl")
    assert [r["step"] for r in expected if r["kind"] == "train"] == list(range(1, _STEPS + 1))
    assert _values(metrics) == expected
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
