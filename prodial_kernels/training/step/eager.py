"""One optimiser step: forward, loss and backward of its micro-batches, clipping, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from prodial_kernels.training.data.batches import IGNORED, Batch, to_device
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.step.chunked_loss import Weight
from prodial_kernels.training.step.loss import Loss
from prodial_kernels.training.step.optimizers import set_learning_rate


class StepResult(NamedTuple):
    """Mean loss of the step's labels, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainingStep(Protocol):
    """Takes optimiser steps. Between the two calls the host is free, to prepare the next batch."""

    def begin(self, parts: Sequence[Batch], lr: float) -> None:
        """Start a step over micro-batches; the device may still be at it afterwards.

        ``parts`` are those of all processes of the run; each computes its share of them.
        """

    def finish(self) -> StepResult:
        """Wait for the step. If its result is not finite, the parameters are as before it."""

    def close(self) -> None:
        """Give back what the steps held on to; another step may still follow."""


class EagerStep:
    """A step launched operation by operation."""

    def __init__(
        self,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        autocast_dtype: torch.dtype | None = None,
        gradients: GradientSum | None = None,
    ) -> None:
        """Train the optimiser's parameters on ``loss``.

        Args:
            loss: Of a micro-batch.
            optimizer: Its learning rate is set in every step.
            clip: Largest gradient norm; 0 for no clipping.
            autocast_dtype: Run forward under autocast to this dtype.
            gradients: Sums over the processes of the run; None where there is one.
        """
        self._loss = loss
        self._optimizer = optimizer
        self._trained = trained_parameters(optimizer)
        self._clip = clip
        self._autocast_dtype = autocast_dtype
        self._gradients = gradients
        self._result: Tensor | None = None

    def begin(self, parts: Sequence[Batch], lr: float) -> None:
        """See :class:`TrainingStep`."""
        device = self._trained[0].device
        own = parts if self._gradients is None else self._gradients.share(parts)
        on_device = [_on_device(part, device) for part in own]
        self._result = self.combine(self.accumulate(on_device, label_weight(parts)))
        set_learning_rate(self._optimizer, lr)

    def finish(self) -> StepResult:
        """See :class:`TrainingStep`."""
        if self._result is None:
            raise RuntimeError("finish() without begin()")
        result = self.result(self._result)
        self._result = None
        if result.finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return result

    def close(self) -> None:
        """See :class:`TrainingStep`."""
        self._result = None

    def accumulate(
        self, parts: Sequence[Batch], weight: Weight, *, every_position: bool = False
    ) -> Tensor:
        """Run forward and backward of micro-batches; wait for nothing.

        Args:
            parts: Their inputs are on the device; with ``every_position`` their labels too.
            weight: Of every label.
            every_position: As the loss takes it.

        Returns:
            The loss, 0-dim: this process's part of it.
        """
        device, dtype = self._trained[0].device, self._autocast_dtype
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                value = self._loss(
                    part.input_ids, part.labels, weight, every_position=every_position, **part.apart
                )
            value.backward()
            total += value.detach()
        return total

    def combine(self, loss: Tensor) -> Tensor:
        """Sum loss and gradients over all processes and clip; on a GPU, wait for nothing.

        Returns:
            ``[2]``: the loss and the norm of the whole gradient before clipping.
        """
        if self._gradients is not None:
            loss = self._gradients.sum(loss)
        norm = nn.utils.clip_grad_norm_(self._trained, self._clip if self._clip > 0 else math.inf)
        return torch.stack([loss, norm.to(loss)])

    def result(self, combined: Tensor) -> StepResult:
        """Wait for what :meth:`combine` returned."""
        if self._gradients is not None:
            self._gradients.finish()
        return StepResult(*combined.tolist())


def _on_device(part: Batch, device: torch.device) -> Batch:
    # The labels stay on the CPU, where the loss drops ignored positions without waiting.
    apart = {name: to_device(value, device) for name, value in part.apart.items()}
    return Batch(to_device(part.input_ids, device), part.labels, **apart)


def label_weight(parts: Sequence[Batch]) -> float:
    """Return one by the number of labels of a step; NaN if it has none.

    By the labels of the whole step, not batch by batch: accumulation changes memory, not the sum.
    """
    n_labels = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in parts)
    return 1 / n_labels if n_labels else math.nan


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the optimiser's parameters, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
