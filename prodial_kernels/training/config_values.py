"""What values an option of a fine-tuning run may have, as far as its type says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """An option is unknown, contradicts another, or has a value that cannot be used."""


MINIMA: dict[str, float] = {
    "max_bytes": 2,
    "eval_tokens": 1,
    "r": 0,
    "steps": 1,
    "batch_size": 1,
    "seq_len": 2,
    "grad_accumulation": 1,
    "weight_decay": 0,
    "warmup": 0,
    "clip": 0,
    "eval_every": 0,
    "save_every": 0,
    "log_every": 1,
}


def checked_value(name: str, value: Any, annotation: str) -> Any:
    """Check one value against its field's annotation; integers pass as floats, lists as tuples.

    Raises:
        ConfigError: It is of another type, or not finite.
    """
    if value is None and "None" in annotation:
        return None
    if name == "memory_budget" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name == "target_modules":
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{name} must be a string or a list of strings, got {value!r}")
    if isinstance(value, Mapping) and "Mapping" in annotation:
        return dict(value)
    expected = annotation.split(" | ")[0]
    fits = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value),
    }[expected]
    if not fits:
        raise ConfigError(f"{name} must be {annotation}, got {value!r}")
    return float(value) if expected == "float" else value
