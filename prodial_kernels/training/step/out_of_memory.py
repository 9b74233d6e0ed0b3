"""Out of memory: what was being done, whether the state is whole, and what would fit.

:class:`GuardedStep` wraps what takes the optimiser steps. When the device runs out of memory in a
forward or backward pass, the parameters are as after the last step and can be saved: the gradients
are dropped and the random generators put back, so that a resumed run takes the same step again.
Within an optimiser's update they may be half changed, and must not be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prodial_kernels.training.data.batches import Batch
from prodial_kernels.training.step.eager import StepResult, TrainingStep


class OutOfMemory(RuntimeError):
    """The device ran out of memory.

    Attributes:
        whole: Whether the parameters are as after the last complete step.
    """

    def __init__(self, message: str, *, whole: bool = True) -> None:
        """Say what was being done."""
        super().__init__(message)
        self.whole = whole

    def explained(self, kept: str, advice: str | None) -> OutOfMemory:
        """Return the error with what is on disk and what to do.

        Args:
            kept: What can be resumed from.
            advice: What would fit, as a sentence; None where nothing was planned.
        """
        if advice is None:
            advice = "Try activations 'checkpoint', a smaller batch_size or a shorter seq_len"
        return OutOfMemory(
            f"{self}; {kept}. {advice}. A run goes on with resume=True, also with "
            "another memory_budget or activations=...; whatever else is changed needs a new one",
            whole=self.whole,
        )


class GuardedStep:
    """Another step, whose out-of-memory errors say what it was doing."""

    def __init__(self, step: TrainingStep, optimizer: torch.optim.Optimizer) -> None:
        """Guard ``step``, which updates ``optimizer``'s parameters."""
        self._step = step
        self._optimizer = optimizer
        self._updating = False
        self._random: dict[str, torch.Tensor] = {}
        self._hooks = (
            optimizer.register_step_pre_hook(self._update_begins),
            optimizer.register_step_post_hook(self._update_ends),
        )

    def begin(self, parts: Sequence[Batch], lr: float) -> None:
        """See :class:`~prodial_kernels.training.step.eager.TrainingStep`; may raise OutOfMemory."""
        self._random = random_states()
        shape = " and ".join(
            sorted({f"{b} x {length}" for b, length in (part.input_ids.shape for part in parts)})
        )
        doing = f"in forward and backward of {len(parts)} x {shape} tokens"
        failed = None
        try:
            self._step.begin(parts, lr)
        except torch.OutOfMemoryError as error:
            failed = self._failure(error, doing)
        if failed is not None:
            raise failed

    def finish(self) -> StepResult:
        """See :class:`~prodial_kernels.training.step.eager.TrainingStep`; may raise OutOfMemory."""
        failed = None
        try:
            return self._step.finish()
        except torch.OutOfMemoryError as error:
            failed = self._failure(error, "in finishing the step")
        raise failed

    def close(self) -> None:
        """See :class:`~prodial_kernels.training.step.eager.TrainingStep`."""
        for hook in self._hooks:
            hook.remove()
        self._step.close()

    def _update_begins(self, *_: Any) -> None:
        self._updating = True

    def _update_ends(self, *_: Any) -> None:
        self._updating = False

    def _failure(self, error: torch.OutOfMemoryError, doing: str) -> OutOfMemory:
        whole = not self._updating
        failure = out_of_memory(error, doing if whole else "in the optimiser's update", whole=whole)
        self._optimizer.zero_grad(set_to_none=True)
        restore_random_states(self._random)
        return failure


def out_of_memory(error: torch.OutOfMemoryError, doing: str, *, whole: bool = True) -> OutOfMemory:
    """Return an error that says what was being done; it does not refer to PyTorch's.

    The frames that PyTorch's error came through hold the activations. Raised outside its handler,
    the new error lets them go, and saving a state has their room.
    """
    first = (str(error).strip().splitlines() or [""])[0]
    return OutOfMemory(f"out of memory {doing}: {first}", whole=whole)


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's random generators, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`random_states` returned, for the devices that there are."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
