"""Measured values for JSON, which has neither infinity nor NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any


def finite_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values, however nested, with None in the place of infinities and NaN."""
    return {name: _finite_or_none(value) for name, value in values.items()}


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite_or_none(value)
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, as ``object_pairs_hook``; ValueError for a name given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} is given twice in one object")
    return values


class JsonReport:
    """A dataclass that is read as JSON too."""

    def to_json(self) -> str:
        """Return everything as indented JSON."""
        values = asdict(self)  # type: ignore[call-overload]
        return json.dumps(finite_or_none(values), indent=2, allow_nan=False)
