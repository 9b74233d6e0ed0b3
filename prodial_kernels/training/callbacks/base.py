"""``Callback``: what a caller of ``finetune()`` may do at the events of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prodial_kernels.training.config import ResolvedConfig
from prodial_kernels.training.results import FinetuneResult
from prodial_kernels.training.run.loop import StepRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunView:
    """The run that an event belongs to.

    Attributes:
        config: What it does; nothing in it is left to a default.
        model: The model in training, with its adapter. Leave its mode and its values alone.
        tokenizer: Its tokenizer.
        output: The run's directory.
        steps: Optimiser steps in all.
        start: Steps that were done when this process began; 0 unless it is resumed.
        history: Records of ``metrics.jsonl`` up to there, evaluations and logged steps, in order.
        id: Of this run and no other, the same whenever it is resumed.
    """

    config: ResolvedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output: Path
    steps: int
    start: int
    history: Sequence[Mapping[str, Any]]
    id: str


class Callback:
    """Does nothing; a subclass overrides what it needs.

    A run that was killed repeats what it did since its last saved state, and so do its callbacks.
    What one remembers is restored from ``run.history`` in :meth:`on_begin`. An error in a callback
    ends the run like any other: it can be resumed.
    """

    def on_begin(self, run: RunView) -> None:
        """Everything is loaded; the first step is about to be taken."""

    def on_step(self, run: RunView, record: StepRecord) -> bool | None:
        """A step is done. Return True to end training with it."""

    def on_evaluate(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> bool | None:
        """The model was evaluated after ``step`` steps. Return True to end training here.

        ``metrics`` are named as in ``metrics.jsonl``: ``bits_per_byte``, ``loss``, ``acc``, ...
        """

    def on_save(self, run: RunView, step: int, path: Path) -> None:
        """The state after ``step`` steps was saved to the directory ``path``."""

    def on_end(self, run: RunView, result: FinetuneResult | None) -> None:
        """The run is over: with its result, or None where it ended in an error or a signal."""
