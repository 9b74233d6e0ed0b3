"""The fine-tuning loop: accumulate, clip, step, log, save, evaluate. Nothing else."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels.training.batches import IGNORED, Batch, TrainingBatches
from prodial_kernels.training.interrupt import Interrupted, StopSignals
from prodial_kernels.training.state import Position


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
        clip: Largest gradient norm; 0 for no clipping.
        grad_accumulation: Micro-batches in a step.
        eval_every: Steps between evaluations; 0 for before and after only.
        save_every: Steps between saves; 0 for the end only.
        autocast_dtype: Run forward passes under autocast to this dtype; None for no autocast.
    """

    steps: int
    lr: float
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 1.0
    grad_accumulation: int = 1
    eval_every: int = 0
    save_every: int = 0
    autocast_dtype: torch.dtype | None = None


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
    """What the loop calls; each is given the position that it belongs to."""

    def logged(self, record: StepRecord) -> None:
        """One optimiser step is done."""

    def save(self, position: Position) -> None:
        """Save the training state."""

    def evaluate(self, position: Position) -> None:
        """Evaluate on the held-out data."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    options: LoopOptions,
    events: LoopEvents,
    *,
    signals: StopSignals,
    position: Position | None = None,
) -> Position:
    """Train from ``position`` to the last step.

    Evaluates before the first step, every ``eval_every`` steps and after the last. A step's state
    is saved before it is evaluated, so a run that is resumed from it continues with the evaluation.

    Args:
        model: A causal language model of transformers; parameters with ``requires_grad`` are
            trained.
        optimizer: An optimiser over those parameters; the loop sets its learning rate.
        batches: Training batches, asked for by micro-batch number.
        options: How to train.
        events: Called for every step, save and evaluation.
        signals: A step that a signal arrives in is finished and saved before the loop stops.
        position: Where to start; by default at the beginning.

    Returns:
        The final position.

    Raises:
        NonFiniteLossError: The loss or its gradient is not finite. No step is taken with it.
        Interrupted: A signal arrived; the state is saved.
    """
    position = Position() if position is None else position
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    saved = position.step
    while True:
        if _is_due(position.step, options.eval_every, options.steps) or position.step == 0:
            try:
                events.evaluate(position)
            except Interrupted:
                if position.step != saved:
                    events.save(position)
                raise
        if position.step >= options.steps:
            return position
        with signals.deferred():
            record = _step(model, optimizer, trained, batches, options, position)
            position = record.position
            events.logged(record)
            due = _is_due(position.step, options.save_every, options.steps)
            if due or signals.received is not None:
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


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step > 0 and step % every == 0)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    batches: TrainingBatches,
    options: LoopOptions,
    position: Position,
) -> StepRecord:
    """Take one optimiser step; leave the parameters alone if its loss is not finite."""
    started = time.perf_counter()
    device = trained[0].device
    first = position.micro_batches
    parts = [batches.batch(first + i) for i in range(options.grad_accumulation)]
    # By the labels of the whole step, not batch by batch: accumulation changes memory, not the sum.
    n_labels = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in parts)
    loss = torch.zeros((), device=device)
    for part in parts:
        part_loss = _summed_loss(model, part, device, options.autocast_dtype) / n_labels
        part_loss.backward()
        loss += part_loss.detach()
    largest = options.clip if options.clip > 0 else math.inf
    norm = nn.utils.clip_grad_norm_(trained, largest)
    lr = learning_rate(options, position.step)
    loss_value, norm_value = torch.stack([loss, norm.to(loss.device)]).tolist()
    if not math.isfinite(loss_value) or not math.isfinite(norm_value):
        optimizer.zero_grad(set_to_none=True)
        what = f"loss is {loss_value}" if not math.isfinite(loss_value) else "gradient overflows"
        raise NonFiniteLossError(
            f"the {what} at step {position.step + 1} (learning rate {lr:.3g}); try a lower "
            f"learning rate such as {options.lr / 10:.1g}, a longer warm-up, or dtype float32"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(part.input_ids.numel() for part in parts)
    seconds = time.perf_counter() - started
    after = Position(
        step=position.step + 1,
        micro_batches=position.micro_batches + len(parts),
        tokens=position.tokens + tokens,
        seconds=position.seconds + seconds,
    )
    return StepRecord(after, loss_value, lr, norm_value, tokens / seconds)


def _summed_loss(
    model: nn.Module, batch: Batch, device: torch.device, autocast_dtype: torch.dtype | None
) -> Tensor:
    """Sum the negative log-likelihood of a batch's labels, in float32."""
    with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits = model(input_ids=batch.input_ids.to(device), use_cache=False).logits
    labels = batch.labels[:, 1:].to(device)
    # The last position predicts what no label holds.
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
