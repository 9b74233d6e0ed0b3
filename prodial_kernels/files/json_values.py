"""Measured values for JSON, which has neither infinity nor NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
