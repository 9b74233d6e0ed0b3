"""The fine-tuning loop: accumulate, clip, step, log, save, evaluate. Nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from prodial_kernels.training.data.batches import Batch, TrainingBatches
from prodial_kernels.training.run.signals import Interrupted, StopSignals
from prodial_kernels.training.run.state import Position
from prodial_kernels.training.step.eager import TrainingStep


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite; the parameters are as after the last step."""


@dataclass(frozen=True)
class LoopOptions:
    """How to train.

    Attributes:
        steps: Optimiser steps in all.
        lr: Peak learning rate.
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"``.
        warmup: Steps of linear warm-up.
        grad_accumulation: Micro-batches in a step.
        eval_every: Steps between evaluations; 0 for before and after only.
        save_every: Steps between saves; 0 for the end only.
    """

    steps: int
    lr: float
    schedule: str = "cosine"
    warmup: int = 0
    grad_accumulation: int = 1
    eval_every: int = 0
    save_every: int = 0

    def reaches(self, position: Position) -> bool:
        """Whether such a training comes past a position."""
        micro_batches = position.step * self.grad_accumulation
        return position.step <= self.steps and position.micro_batches == micro_batches


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did.

    Attributes:
        position: Where the run stands after it.
        loss: Mean negative log-likelihood of the step's labels, nats per token.
        lr: The learning rate used.
        grad_norm: Norm of the whole gradient before clipping.
        tokens_per_second: Input tokens by the step's wall time.
    """

    position: Position
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float


class LoopEvents(Protocol):
    """What the loop calls; each is given the position that it belongs to.

    Attributes:
        stopped: Whether training is to end where it is. Asked after every step and evaluation.
    """

    stopped: bool

    def logged(self, record: StepRecord) -> None:
        """One optimiser step is done."""

    def save(self, position: Position) -> None:
        """Save the training state."""

    def evaluate(self, position: Position) -> None:
        """Evaluate on the held-out data."""


def train(
    model: nn.Module,
    step: TrainingStep,
    batches: TrainingBatches,
    options: LoopOptions,
    events: LoopEvents,
    *,
    signals: StopSignals,
    position: Position | None = None,
) -> Position:
    """Train from ``position`` to the last step, or until ``events.stopped``.

    Evaluates before the first step, every ``eval_every`` steps and after the last. A step's state
    is saved before it is evaluated, so a run that is resumed from it continues with the evaluation.
    That of the step that training ends with is saved in any case.

    Args:
        model: Put into training mode at the start.
        step: Takes the optimiser steps on it.
        batches: Training batches, asked for by micro-batch number.
        options: How to train.
        events: Called for every step, save and evaluation.
        signals: A step that a signal arrives in is finished and saved before the loop stops.
        position: Where to start; by default at the beginning.

    Raises:
        NonFiniteLossError: The loss or its gradient is not finite. No step is taken with it.
        Interrupted: A signal arrived; the state is saved.
    """
    position = Position() if position is None else position
    model.train()
    data = _Prefetcher(batches, options.grad_accumulation)
    saved = position.step
    while True:
        due = _is_due(position.step, options.eval_every, options.steps)
        if due or position.step == 0 or events.stopped:
            try:
                events.evaluate(position)
            except Interrupted:
                if position.step != saved:
                    with signals.deferred():
                        events.save(position)
                raise
        if position.step >= options.steps:
            return position
        if events.stopped:
            if position.step != saved:
                with signals.deferred():
                    events.save(position)
            return position
        with signals.deferred():
            record = _take(step, data, options, position)
            position = record.position
            events.logged(record)
            due = _is_due(position.step, options.save_every, options.steps)
            if due or events.stopped or signals.received is not None:
                events.save(position)
                saved = position.step
        signals.check()


def learning_rate(options: LoopOptions, step: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then the schedule."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    if options.schedule == "linear":
        return options.lr * (1 - progress)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def cut_warm_up(options: LoopOptions) -> str | None:
    """Say how far the learning rate gets in a run that ends within its warm-up; else None."""
    if options.warmup <= options.steps:
        return None
    reached = learning_rate(options, options.steps - 1)
    return (
        f"the warm-up of {options.warmup} steps is longer than the run of {options.steps}: the "
        f"learning rate reaches {reached:.2g} of {options.lr:.2g}"
    )


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step > 0 and step % every == 0)


class _Prefetcher:
    """Makes the next step's micro-batches while the device computes this one's."""

    def __init__(self, batches: TrainingBatches, parts: int) -> None:
        self._batches = batches
        self._parts = parts
        self._prepared: tuple[int, list[Batch]] | None = None

    def get(self, first: int) -> Sequence[Batch]:
        """Return the micro-batches of the step that begins with number ``first``."""
        self.prepare(first)
        found = self._prepared
        self._prepared = None
        return found[1] if found is not None else []

    def prepare(self, first: int) -> None:
        """Make the micro-batches of that step now."""
        if self._prepared is None or self._prepared[0] != first:
            made = [self._batches.batch(first + i) for i in range(self._parts)]
            self._prepared = (first, made)


def _take(
    step: TrainingStep, data: _Prefetcher, options: LoopOptions, position: Position
) -> StepRecord:
    """Take one optimiser step; leave the parameters alone if its loss is not finite."""
    started = time.perf_counter()
    parts = data.get(position.micro_batches)
    lr = learning_rate(options, position.step)
    step.begin(parts, lr)
    if position.step + 1 < options.steps:
        data.prepare(position.micro_batches + len(parts))
    result = step.finish()
    if not result.finite:
        bad_loss = not math.isfinite(result.loss)
        what = f"loss is {result.loss}" if bad_loss else "gradient overflows"
        raise NonFiniteLossError(
            f"the {what} at step {position.step + 1} (learning rate {lr:.3g}); try a lower "
            f"learning rate such as {min(options.lr / 10, 3e-3):.1g}, a longer warm-up, or dtype "
            "float32"
        )
    tokens = sum(part.input_ids.numel() for part in parts)
    seconds = time.perf_counter() - started
    after = Position(
        step=position.step + 1,
        micro_batches=position.micro_batches + len(parts),
        tokens=position.tokens + tokens,
        seconds=position.seconds + seconds,
    )
    return StepRecord(after, result.loss, lr, result.grad_norm, tokens / seconds)
