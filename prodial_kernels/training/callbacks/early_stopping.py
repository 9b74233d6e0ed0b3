"""``EarlyStopping``: end a run whose evaluations no longer get better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prodial_kernels.training.callbacks.base import Callback, RunView
from prodial_kernels.training.results import improves


class EarlyStopping(Callback):
    """Ends training after so many evaluations in a row without a better one."""

    def __init__(self, patience: int = 3, *, least: float = 0.0) -> None:
        """Wait for a better evaluation.

        Args:
            patience: Evaluations without one, at least 1, after which training ends.
            least: By how much the headline metric (bits per byte, or accuracy) must be better.

        Raises:
            ValueError: An argument is out of range.
        """
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not least >= 0:
            raise ValueError(f"least must be at least 0, got {least}")
        self._patience = patience
        self._least = least
        self._best: Mapping[str, Any] | None = None
        self._without = 0

    def on_begin(self, run: RunView) -> None:
        """Count what an earlier part of the run has evaluated."""
        self._best, self._without = None, 0
        for record in run.history:
            if record["kind"] == "evaluation":
                self._count(record)

    def on_evaluate(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> bool:
        """Say whether it was one evaluation too many."""
        self._count(metrics)
        return self._without >= self._patience

    def _count(self, metrics: Mapping[str, Any]) -> None:
        if self._best is None or improves(metrics, self._best, least=self._least):
            self._best, self._without = metrics, 0
        else:
            self._without += 1
