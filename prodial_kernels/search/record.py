"""One trial of a search, as it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

DONE, ENDED, FAILED = "done", "ended early", "failed"


@dataclass(frozen=True)
class Record:
    """A trial that was run.

    Attributes:
        number: Its number in the search, from 1 on.
        step: ``"methods"`` (step one) or ``"sizes"`` (step two).
        on: The parts that were switched on.
        values: Of every knob of theirs, the learning rate and the weight decay.
        options: The options of ``FinetuneConfig`` that all of this came to.
        state: ``"done"``, ``"ended early"`` (it fell behind) or ``"failed"``.
        value: The objective of its last evaluation, to be small; None where it failed.
        metrics: Of that evaluation.
        trainable: Trained parameters.
        steps: Optimiser steps that were taken.
        seconds: Wall time of these.
        error: Why it failed; empty where it did not.
    """

    number: int
    step: str
    on: tuple[str, ...]
    values: Mapping[str, Any]
    options: Mapping[str, Any]
    state: str
    value: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    trainable: int = 0
    steps: int = 0
    seconds: float = 0.0
    error: str = ""

    def numbered(self, number: int) -> Record:
        """Return it with another number."""
        return replace(self, number=number)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


def ranked(records: Iterable[Record]) -> list[Record]:
    """Return the trials that were run to their end, the best first; of equals the smaller."""
    done = [record for record in records if record.state == DONE and record.value is not None]
    return sorted(done, key=lambda r: (r.value, r.trainable, r.number))
