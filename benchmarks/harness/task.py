"""Tasks: prepared by several processes side by side, measured by one at a time.

A process is sent a task, and sends rows back, as a pickle, which names each class with its module.
So nothing here knows what is measured.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from benchmarks.harness.rows import Row


class Prepared(Protocol):
    """What a process holds between preparing a task and measuring it."""

    def measure(self) -> Sequence[Row]:
        """Rows, in the order of the task's."""


class Task(Protocol):
    """One case and what is measured on it: a frozen dataclass, named by ``str``."""

    @property
    def seconds(self) -> float:
        """About how long measuring it takes, once prepared."""

    @property
    def bytes(self) -> int:
        """About how much of the device's memory it needs while others are prepared."""

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> Prepared:
        """Do all that a busy device may do; inside ``alone`` what takes much memory or quiet."""

    def rows(self, status: str) -> Sequence[Row]:
        """Its rows where there are no figures, with the reason."""


def line_of(message: Any) -> str:
    """A message between processes as one line."""
    return base64.b64encode(pickle.dumps(message)).decode() + "\n"


def message_of(line: str) -> Any:
    """The inverse of :func:`line_of`."""
    return pickle.loads(base64.b64decode(line))
