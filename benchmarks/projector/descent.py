"""Search a configuration one field at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Value = int | bool
# By field; ``outer.inner`` inside a nested dataclass.
Changes = Mapping[str, Value]
# An improvement below this is not worth an entry.
WORTHWHILE = 0.01


def descend(
    values: Mapping[str, Sequence[Value]],
    evaluate: Callable[[Sequence[Changes]], Sequence[float | None]],
    start: Mapping[str, Value],
    passes: int = 2,
    until: float = math.inf,
) -> dict[str, Value]:
    """Change one field at a time, keeping the best, until a pass over all fields finds nothing.

    Args:
        values: What to try, by field.
        evaluate: Gives the time of each of several sets of changes relative to no change at all,
            or None for one that cannot run or computes something else.
        start: The fields' values where the search starts.
        passes: At most so many passes.
        until: When to stop, on :func:`time.monotonic`'s clock.

    Returns:
        The changes to the start, empty where nothing was worth it.
    """
    best: dict[str, Value] = {}
    best_time = 1.0
    for _ in range(passes):
        before = dict(best)
        for name, candidates in values.items():
            if time.monotonic() > until:
                break
            now = best.get(name, start[name])
            tried = [{**best, name: value} for value in candidates if value != now]
            for changes, took in zip(tried, evaluate(tried), strict=True):
                if took is not None and took < best_time * (1 - WORTHWHILE):
                    best, best_time = dict(changes), took
        if best == before:
            break
    return {name: value for name, value in best.items() if value != start[name]}


def field_of(config: Any, name: str) -> Value:
    """The value of ``outer.inner`` in nested dataclasses.

    Raises:
        ValueError: No such field.
    """
    for part in name.split("."):
        if not hasattr(config, part):
            raise ValueError(f"values: {type(config).__name__} has no field {part!r}")
        config = getattr(config, part)
    value: Value = config
    return value
