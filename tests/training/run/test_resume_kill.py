"""Runs that are killed without warning, or told to stop, and resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.distributed.forked_commands import Commands

_STEPS = 30


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


def _arguments(output: str) -> list[str]:
    return [
        "finetune", "--model", "model", "--data", "text.txt", "--output", output,
        "--steps", str(_STEPS), "--batch-size", "4", "--seq-len", "48", "--lora-dropout", "0.2",
        "--grad-accumulation", "2", "--eval-every", "8", "--save-every", "5", "--device", "cpu",
        "--keep", "best",
    ]  # fmt: skip


def _when(found: Callable[[], bool], number: int, signalled: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not found():
        time.sleep(0.002)
    assert found()
    os.kill(number, signalled)


def _values(metrics: Path) -> list[dict[str, Any]]:
    records = map(json.loads, metrics.read_text().splitlines())
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def test_kill_and_resume_gives_identical_losses(commands: Commands, place: Path) -> None:
    metrics = place / "b" / "metrics.jsonl"

    def reached(step: int) -> Callable[[], bool]:
        return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()

    undisturbed = commands.start(*_arguments("a"), cwd=place)
    for resumed, step in (([], 7), (["--resume"], 18)):
        number = commands.start(*_arguments("b"), *resumed, cwd=place)
        _when(reached(step), number, signal.SIGKILL)
        assert commands.wait(number) == -signal.SIGKILL
    said = place / "said.txt"
    last = commands.start(*_arguments("b"), "--resume", cwd=place, stderr=said)
    assert commands.wait(last) == 0, said.read_text()
    assert commands.wait(undisturbed) == 0

    expected = _values(place / "a" / "metrics.jsonl")
    assert [r["step"] for r in expected if r["kind"] == "train"] == list(range(1, _STEPS + 1))
    assert _values(metrics) == expected
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (place / "a" / file).read_bytes() == (place / "b" / file).read_bytes()


def test_a_signal_prints_how_to_continue(commands: Commands, place: Path) -> None:
    arguments = [
        "finetune", "--model", str(place / "model"), "--data", str(place / "text.txt"),
        "--steps", "100000", "--seq-len", "32", "--eval-every", "0", "--save-every", "0",
        "--output", "my run",
    ]  # fmt: skip
    metrics, said = place / "my run" / "metrics.jsonl", place / "said by it.txt"
    number = commands.start(*arguments, cwd=place, stderr=said)
    _when(lambda: metrics.exists() and '"train"' in metrics.read_text(), number, signal.SIGTERM)
    assert commands.wait(number) == 143
    error = said.read_text()
    assert "continue with: prodial finetune --resume --output 'my run'" in error
    assert "prodial: error: interrupted by SIGTERM" in error
    assert "Traceback" not in error
    assert len(list((place / "my run" / "state").iterdir())) == 1
