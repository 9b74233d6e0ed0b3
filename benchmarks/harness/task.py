"""What workers are given: tasks, which are prepared side by side and measured one by one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from benchmarks.projector.measure import Row
from benchmarks.projector.roofline import Ceilings


class Prepared(Protocol):
    """What a worker holds between preparing a task and measuring it."""

    def measure(self, ceilings: Ceilings) -> list[Row]:
        """Rows, in the order of the task's."""


class Task(Protocol):
    """One case and what is measured on it; hashable, and named by ``str``."""

    @property
    def part(self) -> str:
        """Its kind, by which a worker tells how to read it."""

    @property
    def seconds(self) -> float:
        """About how long measuring it takes, once prepared."""

    @property
    def bytes(self) -> int:
        """About how much of the device's memory it needs while others are prepared."""

    @property
    def dtype(self) -> str:
        """In which the device's ceilings are measured."""

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> Prepared:
        """Do all that a busy device may do; inside ``alone`` what takes much memory or quiet."""

    def rows(self, status: str) -> list[Row]:
        """Its rows where there are no figures, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """As a worker is asked."""
