"""Callbacks: what they are told, how they end a run, and that resuming repeats nothing wrongly."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prodial_kernels.training import Callback, EarlyStopping, FinetuneConfig, finetune
from prodial_kernels.training.run.metrics import read_metrics
from prodial_kernels.upstream import MissingExtraError
from support.tiny_run import run


class Recorder(Callback):
    """Notes every event; ends the run at ``stop`` = (event, step); fails at ``fail``."""

    def __init__(self, *, stop: Any = None, fail: Any = None) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._stop, self._fail = stop, fail

    def _note(self, *event: Any) -> bool:
        self.events.append(event)
        if event[:2] == self._fail:
            raise RuntimeError("as asked")
        return bool(event[:2] == self._stop)

    def on_begin(self, run: Any) -> None:
        self._note("begin", run.start)
        assert run.steps == run.config.steps
        assert run.model.training is False
        self.ids = run.id
        self.history = [(r["kind"], r["step"]) for r in run.history]

    def on_step(self, run: Any, record: Any) -> bool:
        assert record.loss > 0
        return self._note("step", record.position.step)

    def on_evaluate(self, run: Any, step: int, metrics: Any) -> bool:
        assert metrics["bits_per_byte"] > 0
        return self._note("evaluate", step)

    def on_save(self, run: Any, step: int, path: Path) -> None:
        assert (path / "state.json").is_file()
        # What is drawn here must not be missing from what a resumed run draws.
        torch.rand(3)
        self._note("save", step)

    def on_end(self, run: Any, result: Any) -> None:
        self._note("end", None if result is None else result.steps)


OPTIONS: dict[str, Any] = {"steps": 6, "eval_every": 2, "save_every": 3, "lora_dropout": 0.3}


def trained(place: Path, output: Path, *callbacks: Callback, **options: Any) -> Any:
    return run(place, output, **{**OPTIONS, **options}, callbacks=callbacks)


def losses(output: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(output / "metrics.jsonl") if "lr" in r]


def test_events_in_their_order(place: Path, tmp_path: Path) -> None:
    told = Recorder()
    trained(place, tmp_path / "a", told)
    assert told.events == [
        ("begin", 0), ("evaluate", 0), ("step", 1), ("step", 2), ("evaluate", 2), ("step", 3),
        ("save", 3), ("step", 4), ("evaluate", 4), ("step", 5), ("step", 6), ("save", 6),
        ("evaluate", 6), ("end", 6),
    ]  # fmt: skip
    trained(place, tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_failed_run_ends_and_is_resumed_bit_for_bit(place: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "a")
    first = Recorder(fail=("step", 5))
    with pytest.raises(RuntimeError, match="as asked"):
        trained(place, tmp_path / "b", first)
    assert first.events[-1] == ("end", None)
    second = Recorder()
    trained(place, tmp_path / "b", second, resume=True)
    assert second.events[:2] == [("begin", 3), ("step", 4)]
    assert second.ids == first.ids
    assert second.history == [
        ("evaluation", 0), ("train", 1), ("train", 2), ("evaluation", 2), ("train", 3),
    ]  # fmt: skip
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("where", ["step", "evaluate"])
def test_a_callback_ends_training(place: Path, tmp_path: Path, where: str) -> None:
    result = trained(place, tmp_path / "a", Recorder(stop=(where, 4)))
    assert (result.steps, result.planned_steps, result.kept_step) == (4, 6, 4)
    assert result.after["step"] == 4
    assert "4 of 6 steps" in str(result)
    # Stopped, not finished: killed before the model is written, it is not trained on.
    (tmp_path / "a" / "results.json").unlink()
    again = Recorder()
    resumed = trained(place, tmp_path / "a", again, resume=True)
    assert again.events == [("begin", 4), ("evaluate", 4), ("end", 4)]
    assert resumed.after == result.after
    assert read_metrics(tmp_path / "a" / "metrics.jsonl")[-2:] == [
        {"kind": "stop", "step": 4}, resumed.after
    ]  # fmt: skip


def test_early_stopping_counts_on_after_a_resume(place: Path, tmp_path: Path) -> None:
    """Evaluations never get better by 100 bits: two after the first end it, resumed or not."""
    stopping = EarlyStopping(2, least=100.0)
    assert trained(place, tmp_path / "a", stopping).steps == 4
    with pytest.raises(RuntimeError):
        trained(
            place, tmp_path / "b", EarlyStopping(2, least=100.0), Recorder(fail=("evaluate", 4))
        )
    assert trained(place, tmp_path / "b", EarlyStopping(2, least=100.0), resume=True).steps == 4
    assert trained(place, tmp_path / "c", EarlyStopping(2)).steps == 6
    for arguments in ({"patience": 0}, {"least": -1.0}):
        with pytest.raises(ValueError, match="must be at least"):
            EarlyStopping(**arguments)  # type: ignore[arg-type]


def test_what_is_no_callback_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="callbacks must be of prodial_kernels"):
        trained(place, tmp_path / "a", print)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


# --- Trackers. ----------------------------------------------------------------------------------


class _Trackio(ModuleType):
    """Stands in for trackio, as accelerate calls it."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.started: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> _Trackio:
        self.started.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> _Trackio:
    pytest.importorskip("accelerate")
    module = _Trackio()
    module.config = type("Config", (dict,), {"update": lambda self, v, **_: dict.update(self, v)})()
    module.__spec__ = type("Spec", (), {"origin": "trackio.py"})()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trackers_get_options_steps_and_evaluations(
    place: Path, tmp_path: Path, trackio: _Trackio
) -> None:
    trained(place, tmp_path / "a", report_to=("trackio",), log_every=4)
    trained(place, tmp_path / "b")
    assert losses(tmp_path / "a") == [
        entry for entry in losses(tmp_path / "b") if entry[0] in (4, 6)
    ]
    (started,) = trackio.started
    assert started["project"] == "prodial"
    assert started["resume"] == "allow"
    assert started["name"].startswith("a: prodial, model (")
    assert trackio.config["steps"] == 6
    assert trackio.config["target_modules"] == "['in_proj', 'out_proj']"
    assert [(step, min(values)) for step, values in trackio.logged] == [
        (0, "eval/bits_per_byte"), (2, "eval/bits_per_byte"), (4, "train/grad_norm"),
        (4, "eval/bits_per_byte"), (6, "train/grad_norm"), (6, "eval/bits_per_byte"),
    ]  # fmt: skip
    assert trackio.finished == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_tracker_is_closed_and_found_again(
    place: Path, tmp_path: Path, trackio: _Trackio
) -> None:
    with pytest.raises(RuntimeError):
        trained(place, tmp_path / "a", Recorder(fail=("step", 5)), report_to=("trackio",))
    assert trackio.finished == 1
    trained(place, tmp_path / "a", report_to=("trackio",), resume=True)
    assert trackio.started[0] == trackio.started[1]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_named(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("tensorboard", "tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, library, None)
    # A folder of its logs is not the library.
    (tmp_path / tracker).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    config = FinetuneConfig(output=str(tmp_path / "run"), report_to=(tracker,), device="cpu")
    with pytest.raises(MissingExtraError, match=f"'{tracker}' needs {tracker}, .*pip install"):
        finetune(config)
    assert not (tmp_path / "run").exists()
