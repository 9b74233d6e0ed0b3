"""Rows: what was measured of one thing, or the reason why there are no figures.

A row is a dataclass with a ``status``: empty until it is measured, then ``"ok"``, or
``unavailable``, ``refused`` or ``failed`` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol


class Row(Protocol):
    """What all rows have."""

    @property
    def status(self) -> str:
        """``"ok"``, or why there are no figures."""


class Unavailable(Exception):
    """What is to be measured cannot run here."""


class Refusal(Exception):
    """What is to be measured computes something else; the message says where and by how much."""


def values_of(row: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: without the figures that were not taken."""
    return {
        field.name: value
        for field in fields(row)
        if (value := getattr(row, field.name)) is not None or field.default is not None
    }


@contextmanager
def reported(row: Any = None) -> Iterator[None]:
    """Make what goes wrong the row's status; without a row it is dropped."""
    try:
        yield
    except Exception as error:
        if row is not None:
            row.status = status_of(error)


def status_of(error: BaseException) -> str:
    """The status of a row whose figures could not be had."""
    if isinstance(error, Unavailable):
        return f"unavailable: {error}"
    if isinstance(error, Refusal):
        return f"refused: {error}"
    # What follows the first lines of a CUDA error is the same advice every time.
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:200]}"


def ratio(value: float | None, floor: float | None) -> float | None:
    """``value`` over the floor's; None where one of them was not taken."""
    return None if value is None or floor is None else value / floor
