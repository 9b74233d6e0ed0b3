"""Telling the callbacks of a run, in their order, without a trace in what the run computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.training.callbacks.base import Callback, RunView
from prodial_kernels.training.callbacks.trackers import Tracking
from prodial_kernels.training.results import FinetuneResult
from prodial_kernels.training.run.loop import StepRecord
from prodial_kernels.training.step.out_of_memory import random_states, restore_random_states


class Watch:
    """The callbacks of one run."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Tell these.

        Raises:
            TypeError: One is no :class:`Callback`.
        """
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(
                    f"callbacks must be of prodial_kernels.training.Callback, got {callback!r:.60}"
                )
        self._callbacks = callbacks
        self._begun: list[Callback] = []
        self._view: RunView | None = None

    @property
    def may_end(self) -> bool:
        """Whether one of them can end training; trackers never do."""
        return any(not isinstance(callback, Tracking) for callback in self._callbacks)

    def begin(self, view: RunView) -> None:
        """Tell them of the run."""
        self._view = view
        for callback in self._callbacks:
            self._begun.append(callback)
            callback.on_begin(view)

    def step(self, record: StepRecord) -> list[str]:
        """Tell them of a step; return the names of those that want to end training."""
        view = self._run
        return [_name(c) for c in self._callbacks if c.on_step(view, record)]

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Tell them of an evaluation; return the names of those that want to end training."""
        view = self._run
        return [_name(c) for c in self._callbacks if c.on_evaluate(view, step, metrics)]

    def saved(self, step: int, path: Path) -> None:
        """Tell them of a saved state, whose random numbers are the next that are drawn."""
        if not self._callbacks:
            return
        before = random_states()
        for callback in self._callbacks:
            callback.on_save(self._run, step, path)
        if any(not torch.equal(state, before[kind]) for kind, state in random_states().items()):
            restore_random_states(before)

    def end(self, result: FinetuneResult | None) -> None:
        """Tell those that were told of its beginning that the run is over."""
        begun, self._begun = self._begun, []
        for callback in begun:
            callback.on_end(self._run, result)

    @property
    def _run(self) -> RunView:
        if self._view is None:
            raise RuntimeError("begin() comes first")
        return self._view


def _name(callback: Callback) -> str:
    return type(callback).__name__
