"""Trackers (TensorBoard, Weights & Biases, trackio), through accelerate's classes for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prodial_kernels.training.callbacks.base import Callback, RunView
from prodial_kernels.training.results import FinetuneResult
from prodial_kernels.training.run.directory import RunDirectory
from prodial_kernels.training.run.loop import StepRecord
from prodial_kernels.upstream import MissingExtraError


@dataclass(frozen=True)
class _Kind:
    """A tracker: its class in ``accelerate.tracking``, its libraries (one will do), arguments."""

    tracker: str
    libraries: tuple[str, ...]
    arguments: Callable[[RunView], dict[str, Any]]


def _of_a_project(variable: str) -> Callable[[RunView], dict[str, Any]]:
    """Arguments of a tracker that keeps runs by project and name, resumed as one."""

    def arguments(run: RunView) -> dict[str, Any]:
        project = os.environ.get(variable, "prodial")
        return {"run_name": project, "name": _run_name(run), "resume": "allow"}

    return arguments


def _of_wandb(run: RunView) -> dict[str, Any]:
    # By which a resumed run is found again.
    return {**_of_a_project("WANDB_PROJECT")(run), "id": run.id}


def _of_tensorboard(run: RunView) -> dict[str, Any]:
    # What was written after the state that a run is resumed from is written again.
    return {
        "run_name": "",
        "logging_dir": str(RunDirectory(run.output).tensorboard),
        "purge_step": run.start + 1,
    }


_KINDS = {
    "tensorboard": _Kind("TensorBoardTracker", ("tensorboard", "tensorboardX"), _of_tensorboard),
    "wandb": _Kind("WandBTracker", ("wandb",), _of_wandb),
    "trackio": _Kind("TrackioTracker", ("trackio",), _of_a_project("TRACKIO_PROJECT")),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError, which names what to install, unless the trackers can be used."""
    for name in names:
        kind = _KINDS[name]
        missing = [] if _installed("accelerate") else ["accelerate"]
        if not any(map(_installed, kind.libraries)):
            missing.append(kind.libraries[0])
        if missing:
            raise MissingExtraError(
                f"report_to {name!r} needs {', '.join(missing)}, not installed here: "
                f"pip install {' '.join(missing)}"
            )


class Tracking(Callback):
    """Reports a run to one tracker: its options, logged steps, evaluations."""

    def __init__(self, name: str) -> None:
        """Take one of the names of ``FinetuneConfig.report_to``; nothing is started yet."""
        self._kind = _KINDS[name]
        self._tracker: Any = None

    def on_begin(self, run: RunView) -> None:
        """Start the tracker, and tell it the run's options."""
        from accelerate import PartialState, tracking

        # Without it they say nothing, and raise where they would.
        PartialState()
        self._tracker = getattr(tracking, self._kind.tracker)(**self._kind.arguments(run))
        self._tracker.start()
        options = {k: v for k, v in run.config.to_dict().items() if v is not None}
        plain = (bool, int, float, str)
        self._tracker.store_init_configuration(
            {k: v if isinstance(v, plain) else str(v) for k, v in options.items()}
        )

    def on_step(self, run: RunView, record: StepRecord) -> None:
        """Report a step where it is logged."""
        step = record.position.step
        if step % run.config.log_every and step != run.steps:
            return
        values = {
            "train/loss": record.loss,
            "train/learning_rate": record.lr,
            "train/grad_norm": record.grad_norm,
            "train/tokens": record.position.tokens,
            "train/tokens_per_second": record.tokens_per_second,
        }
        self._tracker.log(values, step=step)

    def on_evaluate(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> None:
        """Report an evaluation."""
        values = {f"eval/{name}": value for name, value in metrics.items() if value is not None}
        self._tracker.log(values, step=step)

    def on_end(self, run: RunView, result: FinetuneResult | None) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


def _run_name(run: RunView) -> str:
    path = Path(run.config.model)
    model = path.name if path.is_dir() else run.config.model
    # Some find a run to resume by its name alone.
    return f"{run.output.name}: {run.config.method}, {model} ({run.id[:8]})"


def _installed(library: str) -> bool:
    try:
        spec = find_spec(library)
    except ValueError:
        spec = None
    # A folder of logs that has the name of its library is a namespace package, without a file.
    return spec is not None and spec.origin is not None
