"""``keep="best"``: what is written is the best evaluation, however often the run was killed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.checkpoint import read_adapter
from prodial_kernels.training import Callback, FinetuneResult, finetuning
from prodial_kernels.training.run.best import BestKept
from prodial_kernels.training.run.metrics import read_metrics
from prodial_kernels.training.run.state import StateError
from support.tiny_run import run

# Evaluated every 2 steps, saved every 3: the best is after step 6, and one at 2 was best before.
BITS = {0: 5.0, 2: 3.0, 4: 4.0, 6: 2.0, 8: 3.5, 10: 2.5}
OPTIONS: dict[str, Any] = {"steps": 10, "eval_every": 2, "save_every": 3, "keep": "best"}


class _Stops(Exception):
    """In the place of a kill."""


class _Killer(Callback):
    def __init__(self, event: str, step: int) -> None:
        self._at = (event, step)

    def on_step(self, run: Any, record: Any) -> None:
        self._maybe("step", record.position.step)

    def on_evaluate(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
        self._maybe("evaluate", step)

    def on_save(self, run: Any, step: int, path: Path) -> None:
        self._maybe("save", step)

    def _maybe(self, event: str, step: int) -> None:
        if (event, step) == self._at:
            raise _Stops


@pytest.fixture(autouse=True)
def bits(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The evaluations to come, by step; the real ones would have to be trained for."""
    values = dict(BITS)

    def evaluate(events: finetuning.RunEvents) -> dict[str, Any]:
        return {"bits_per_byte": values[events.position.step], "loss": 1.0}

    monkeypatch.setattr(finetuning.RunEvents, "metrics", evaluate)
    return values


def trained(place: Path, output: Path, **options: Any) -> FinetuneResult:
    return run(place, output, **{**OPTIONS, **options})


def adapter_of(result: FinetuneResult) -> dict[str, torch.Tensor]:
    return read_adapter(result.adapter_dir or "").tensors


@pytest.fixture(scope="module")
def six_steps(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter after 6 of 10 steps, by a run that a callback ends there."""

    class _Ends(Callback):
        def on_step(self, run: Any, record: Any) -> bool:
            return bool(record.position.step == 6)

    folder = tmp_path_factory.mktemp("six")
    result = run(
        place, folder / "run", steps=10, eval_every=0, save_every=0, callbacks=[_Ends()]
    )  # fmt: skip
    return adapter_of(result)


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_the_best_is_written_and_named(
    place: Path, tmp_path: Path, six_steps: dict[str, torch.Tensor]
) -> None:
    result = trained(place, tmp_path / "best")
    assert same(adapter_of(result), six_steps)
    assert (result.steps, result.kept_step, result.after["step"]) == (10, 6, 6)
    assert result.after["bits_per_byte"] == 2.0
    assert re.search(r"written +step 6, the best evaluation", str(result))
    assert result.agreement.relative < 1e-5
    last = trained(place, tmp_path / "last", keep="last")
    assert not same(adapter_of(last), six_steps)
    assert last.kept_step == last.after["step"] == 10
    assert "was best, 2.0000 at step 6; what is saved is step 10" in str(last)


@pytest.mark.parametrize(
    "kill",
    [("evaluate", 0), ("step", 5), ("evaluate", 6), ("save", 6), ("step", 8), ("save", 9),
     ("evaluate", 10)],
)  # fmt: skip
def test_killed_and_resumed_it_is_the_same(
    place: Path, tmp_path: Path, six_steps: dict[str, torch.Tensor], kill: tuple[str, int]
) -> None:
    with pytest.raises(_Stops):
        trained(place, tmp_path / "run", callbacks=[_Killer(*kill)])
    result = trained(place, tmp_path / "run", resume=True)
    assert same(adapter_of(result), six_steps)
    assert result.kept_step == 6
    # Killed while the best were written, a part of one may lie there: it goes.
    assert not [p for p in (tmp_path / "run" / "best").iterdir() if p.name.startswith(".")]


def test_what_a_state_was_best_at_outlives_later_ones(
    place: Path, tmp_path: Path, bits: dict[int, float]
) -> None:
    """Evaluated otherwise the second time, as on another machine: the first best still is."""
    with pytest.raises(_Stops):
        trained(place, tmp_path / "run", callbacks=[_Killer("step", 8)])
    kept = sorted(path.name for path in (tmp_path / "run" / "best").iterdir())
    # States 3 and 6 are there; of both the best before is the one after step 2.
    assert kept == ["step-000002", "step-000006"]
    bits |= {6: 9.0, 8: 9.0, 10: 9.0}
    result = trained(place, tmp_path / "run", resume=True)
    assert (result.kept_step, result.after["bits_per_byte"]) == (2, 3.0)


def test_a_run_that_never_gets_better_says_so(
    place: Path, tmp_path: Path, bits: dict[int, float]
) -> None:
    bits[0] = 1.0
    result = trained(place, tmp_path / "run")
    assert result.kept_step == 0
    assert "never got better than it was: what is written is unchanged" in str(result)


def test_what_was_not_kept_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that began with ``keep="last"`` can go on with ``"best"``."""
    with pytest.raises(_Stops):
        trained(place, tmp_path / "run", keep="last", callbacks=[_Killer("step", 8)])
    result = trained(place, tmp_path / "run", resume=True, progress=True)
    # The state after step 6 was saved before it was evaluated, so this is done again.
    assert result.kept_step == 6
    assert "best evaluation so far, after step 2, were not kept" in capsys.readouterr().err


def test_damaged_parameters_are_no_result(place: Path, tmp_path: Path) -> None:
    class _Damages(Callback):
        def on_step(self, run: Any, record: Any) -> None:
            if record.position.step == 10:
                file = run.output / "best" / "step-000006" / "tensors.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"?")

    with pytest.raises(StateError, match=r"step-000006.*checksum does not match"):
        trained(place, tmp_path / "run", callbacks=[_Damages()])


def test_another_runs_are_not_taken(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    first = BestKept(tmp_path / "best", model, run="one", step=0)
    assert first.offer(0, {"acc": 0.5})
    assert not first.offer(5, {"acc": 0.5})
    assert first.offer(10, {"acc": 0.75})
    # Continued after step 7: what was evaluated later is again.
    best = BestKept(tmp_path / "best", model, run="one", step=7).best
    assert best is not None
    assert (best.step, best.metrics) == (0, {"acc": 0.5})
    assert BestKept(tmp_path / "best", model, run="two", step=7).best is None
    assert not list((tmp_path / "best").iterdir())
    told: list[str] = []
    assert BestKept(tmp_path / "best", model, run="one", step=0).offer(0, {"acc": None})
    BestKept(tmp_path / "best", torch.nn.Linear(3, 2), run="one", step=7, say=told.append)
    assert "its parameters are not this model's" in told[0]


def test_evaluations_are_in_the_metrics_all_the_same(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = {r["step"]: r["bits_per_byte"] for r in records if r["kind"] == "evaluation"}
    assert found == BITS
