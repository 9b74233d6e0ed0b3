"""The values of a row: checked one by one, and named where they are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from prodial_kernels.training.data.examples import DataError

Row: TypeAlias = Mapping[str, Any]


def string(row: Row, key: str) -> str:
    """Return a value that must be text.

    Raises:
        DataError: It is something else.
    """
    return as_string(row[key], f"'{key}'")


def as_string(value: Any, what: str) -> str:
    """Return a text; ``what`` names it in the error.

    Raises:
        DataError: It is something else.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid Unicode: {error.reason}") from None
    return value


def strings(value: Any, what: str) -> tuple[str, ...]:
    """Return texts that must come in a list.

    Raises:
        DataError: It is something else.
    """
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise DataError(f"{what} must be a list of strings, got {type(value).__name__}")
    return tuple(as_string(item, f"{what}[{index}]") for index, item in enumerate(value))


def label(row: Row, key: str) -> int:
    """Return a whole number, written as one or as digits.

    Raises:
        DataError: It is something else.
    """
    value = row[key]
    # No label has as many digits as Python refuses to read.
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value in ("", None):
        raise DataError(f"'{key}' is empty: test splits often come without labels; use another")
    raise DataError(f"'{key}' must be a whole number, got {value!r:.60}")
