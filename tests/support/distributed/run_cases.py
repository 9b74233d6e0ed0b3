"""What two processes of a run are put through; see ``tests/training/distributed/test_runs.py``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.mamba2.modeling_mamba2  # noqa: F401  # before the processes fork

from prodial_kernels.training import Callback
from prodial_kernels.training.callbacks.base import RunView
from prodial_kernels.training.callbacks.events import RunEvents
from prodial_kernels.training.distributed.launch import Launch
from prodial_kernels.training.distributed.world import joined
from prodial_kernels.training.run import preparation
from prodial_kernels.training.run.loop import StepRecord
from support.distributed import shard_cases, user_cases
from support.tiny_run import run

FOUR_BITS: dict[str, Any] = {"steps": 3, "quantize": "nf4", "quantize_modules": "all"}
DROPOUT: dict[str, Any] = {"lora_dropout": 0.2, "save_every": 3}


def rank() -> int:
    """The number of this process."""
    return int(os.environ["RANK"])


def plain(place: Path) -> dict[str, Any]:
    result = run(place, place / "plain")
    return result.to_dict()


def accumulated(place: Path) -> int:
    return run(place, place / "accumulated", steps=6, grad_accumulation=4).processes


def undisturbed(place: Path) -> int:
    return run(place, place / "undisturbed", **DROPOUT).steps


def at_step(step: int, do: Callable[[], None]) -> None:
    """Let this process do something when a step is done."""
    logged = RunEvents.logged

    def also(events: RunEvents, record: Any) -> None:
        logged(events, record)
        if record.position.step == step:
            do()

    RunEvents.logged = also  # type: ignore[method-assign]


def stopped(place: Path) -> None:
    if rank() == 1:
        at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(place, place / "disturbed", **DROPOUT)


def stopped_in_evaluation(place: Path) -> None:
    metrics = RunEvents.metrics

    def late(events: RunEvents) -> dict[str, Any]:
        found = metrics(events)
        if rank() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    RunEvents.metrics = late  # type: ignore[method-assign]
    run(place, place / "evaluating", steps=4, eval_every=0)


class EndsAtStepThree(Callback):
    """Asked in the first process only, and all end with it."""

    def on_step(self, run: RunView, record: StepRecord) -> bool:
        assert rank() == 0
        return record.position.step == 3


def ended_by_a_callback(place: Path) -> dict[str, Any]:
    result = run(
        place, place / "ended", callbacks=[EndsAtStepThree()], keep="best", shard=True
    )  # fmt: skip
    return {"steps": result.steps, "kept": result.kept_step}


def killed(which: int, step: int) -> Callable[[Path], None]:
    def case(place: Path) -> None:
        if rank() == which:
            at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        resume = (place / "disturbed" / "run.json").exists()
        run(place, place / "disturbed", resume=resume, **DROPOUT)

    return case


def restarted(place: Path) -> int:
    # As torchrun --max-restarts starts the same command again.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return run(place, place / "disturbed", **DROPOUT).steps


def resumed(place: Path) -> int:
    return run(place, place / "disturbed", resume=True, **DROPOUT).steps


def fails_while_loading(place: Path) -> None:
    if rank() == 1:

        def fails(*arguments: Any, **options: Any) -> Any:
            raise OSError(28, "no space left", "cache")

        preparation.load_documents = fails
    run(place, place / "failing")


def fails_in_a_step(place: Path) -> None:
    if rank() == 0:

        def fail() -> None:
            raise RuntimeError("the first process has had enough")

        at_step(2, fail)
    run(place, place / "failing")


def waits_as_a_device_does(place: Path) -> None:
    """Another process is killed, and no connection tells of it."""
    with joined(Launch.from_environment(), torch.device("cpu")) as world:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.poll(lambda: False)


def sharded(place: Path) -> int:
    return run(place, place / "sharded", shard=True).steps


def sharded_in_four_bits(place: Path) -> int:
    return run(place, place / "four-bits", shard=True, **FOUR_BITS).steps


def different(place: Path) -> None:
    run(place, place / "failing", seed=rank())


CASES = {
    "plain": plain,
    "sharded": sharded,
    "sharded_in_four_bits": sharded_in_four_bits,
    "waits_as_a_device_does": waits_as_a_device_does,
    "accumulated": accumulated,
    "undisturbed": undisturbed,
    "stopped": stopped,
    "killed_first": killed(0, 7),
    "killed_second": killed(1, 10),
    "restarted": restarted,
    "resumed": resumed,
    "stopped_in_evaluation": stopped_in_evaluation,
    "ended_by_a_callback": ended_by_a_callback,
    "fails_while_loading": fails_while_loading,
    "fails_in_a_step": fails_in_a_step,
    "different": different,
    **user_cases.CASES,
    **shard_cases.CASES,
}
