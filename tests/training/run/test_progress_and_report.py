"""What a run shows: progress that never runs backwards, the curve, the table, the versions."""

from __future__ import annotations

import io
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.training.merging import Agreement
from prodial_kernels.training.results import FinetuneResult, best_evaluation
from prodial_kernels.training.run import progress as progress_module
from prodial_kernels.training.run.loop import StepRecord
from prodial_kernels.training.run.plot import plot_loss, smoothed, window_of
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.run.state import Position
from prodial_kernels.training.run.versions import versions

# --- progress ------------------------------------------------------------------------------------


class Clock:
    """Stands still unless it is told that time has passed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_elapsed_time_never_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    clock, shown = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress_module.time, "perf_counter", clock)
    # Lines come as often as in a file, by a clock of our own.
    create = tqdm.__init__

    def with_clock(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        if not self.disable:
            self._time = clock
            self.start_t = self.last_print_t = clock.now

    monkeypatch.setattr(tqdm, "__init__", with_clock)
    display = Progress()
    with display.training(150, Position()):
        for step in range(1, 151):
            clock.now += 1.0
            after = Position(step=step, micro_batches=step, tokens=step * 100, seconds=float(step))
            display.step(StepRecord(after, 1.0, 0.1, 1.0, 100.0))
            if step % 50 == 0:
                with display.evaluating():
                    clock.now += 30.0
    lines = re.findall(r"(\d+)/150 [^\r]*?\[(\d+):(\d+), ETA (\d+):(\d+)", shown.getvalue())
    assert len(lines) >= 8
    for done, minutes, seconds, eta_minutes, eta_seconds in lines:
        # One second a step, whatever the evaluations took.
        assert 60 * int(minutes) + int(seconds) == int(done)
        left = 60 * int(eta_minutes) + int(eta_seconds)
        assert int(done) == 0 or left == 150 - int(done)


# --- the curve -----------------------------------------------------------------------------------


def test_the_smoothed_curve_follows_a_slope_without_lag() -> None:
    steps = [float(step) for step in range(1, 101)]
    line = [3.0 - 0.02 * step for step in steps]
    assert smoothed(steps, line, 11) == pytest.approx(line)
    # Also where steps are logged unevenly, and however large their numbers are.
    uneven = [1e6 + step**1.5 for step in steps]
    assert smoothed(uneven, [5.0 - 1e-3 * s for s in uneven], 11) == pytest.approx(
        [5.0 - 1e-3 * s for s in uneven], rel=1e-6
    )


def test_the_smoothed_curve_is_smooth_and_ends_where_the_curve_does() -> None:
    rng = random.Random(0)
    true = [2.0 + 2.0 * math.exp(-step / 60) for step in range(300)]
    noisy = [value + rng.gauss(0, 0.1) for value in true]
    found = smoothed(list(range(300)), noisy, window_of(300))
    errors = [abs(a - b) for a, b in zip(found, true, strict=True)]
    assert max(errors) < 0.11
    assert sum(errors) / 300 < 0.03


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_short_runs_have_a_curve_too(n: int, tmp_path: Path) -> None:
    assert smoothed(list(range(n)), [1.0] * n, window_of(n)) == pytest.approx([1.0] * n)
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": 2.0} for step in range(1, n + 1)
    ]
    records.append({"kind": "evaluation", "step": n, "loss": 2.0, "bits_per_byte": 1.0})
    plot_loss(records, tmp_path / "loss.png", title="x")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_window_grows_with_the_run() -> None:
    assert [window_of(n) for n in (1, 20, 150, 3000)] == [1, 7, 15, 301]


# --- the table -----------------------------------------------------------------------------------


def result(**changes: Any) -> FinetuneResult:
    values: dict[str, Any] = {
        "method": "prodial", "rank": 4, "before": {"step": 0, "bits_per_byte": 1.4},
        "after": {"step": 9, "bits_per_byte": 1.2}, "best": {"step": 9, "bits_per_byte": 1.2},
        "trainable": 1, "total": 2, "steps": 9, "tokens": 9, "train_seconds": 1.0, "seconds": 2.0,
        "peak_bytes": 1, "memory": None, "device": "cpu",
        "agreement": Agreement(0.0, 0.0, 1.0, 4), "output": Path("out"),
        "adapter_dir": None, "model_dir": Path("out/model"),
    }  # fmt: skip
    return FinetuneResult(**{**values, **changes})


def test_a_run_that_made_it_worse_says_so() -> None:
    assert "warning" not in str(result())
    worse = result(after={"step": 9, "bits_per_byte": 1.5})
    assert "held-out bits per byte got worse in training; try fewer steps" in str(worse)
    accuracy = {"before": {"step": 0, "acc": 0.71}, "best": {"step": 0, "acc": 0.71}}
    assert "held-out accuracy got worse" in str(result(after={"step": 9, "acc": 0.43}, **accuracy))


def test_a_run_that_was_better_before_its_end_says_so() -> None:
    table = str(result(best={"step": 5, "bits_per_byte": 1.1}))
    assert "was best, 1.1000 at step 5; what is saved is step 9" in table


def test_rows_that_were_cut_are_in_the_table() -> None:
    assert "3 of 12 rows were cut" in str(result(data={"rows_cut": 3, "train": 12}))


def test_held_out_contexts_that_were_cut_are_in_the_table() -> None:
    after = {"step": 9, "bits_per_byte": 1.2, "n_truncated": 4}
    assert "4 held-out contexts lost their start: raise seq_len" in str(result(after=after))


def test_the_best_evaluation() -> None:
    losses = [{"step": s, "bits_per_byte": b} for s, b in ((0, 1.4), (5, 1.1), (9, 1.1))]
    assert best_evaluation(losses)["step"] == 5
    choices = [{"step": s, "acc": a} for s, a in ((0, 0.4), (5, 0.6), (9, 0.5))]
    assert best_evaluation(choices)["step"] == 5


def test_versions_are_those_in_use() -> None:
    import torch
    import transformers

    import prodial_kernels

    found = versions()
    assert found["prodial-kernels"] == prodial_kernels.__version__
    assert found["transformers"] == transformers.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
