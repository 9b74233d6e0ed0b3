"""What values an option of a fine-tuning run may have, as far as the option alone can say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prodial_kernels._suggestions import did_you_mean


class ConfigError(ValueError):
    """An option is unknown, contradicts another, or has a value that cannot be used.

    In the message that it is made with, names of options stand in back quotes. ``str()`` leaves
    the quotes out; whoever calls options by other names asks for those.
    """

    def __init__(self, message: str) -> None:
        """Take a message with names of options in back quotes."""
        super().__init__(message.replace("`", ""))
        self._marked = message

    def renamed(self, rename: Callable[[str], str]) -> str:
        """Return the message with each name of an option replaced by ``rename(name)``."""
        return re.sub(r"`(\w+)`", lambda match: rename(match.group(1)), self._marked)


# Smallest and largest value. The upper bounds are far from what anybody trains with: a value over
# one is a slip of the keyboard, and would end in an overflow, a loss of NaN or a wait for ever.
RANGES: dict[str, tuple[float, float]] = {
    "max_bytes": (2, 2**50),
    "eval_tokens": (1, 2**50),
    "r": (0, 2**16),
    "lora_alpha": (-1e6, 1e6),
    "steps": (1, 10**9),
    "epochs": (0, 1e6),
    "batch_size": (1, 2**26),
    "seq_len": (2, 2**26),
    "grad_accumulation": (1, 2**26),
    "lr": (0, 100),
    "weight_decay": (0, 1000),
    "warmup": (0, 10**9),
    "clip": (0, 1e9),
    "seed": (-(2**63), 2**64 - 1),
    "eval_every": (0, 10**9),
    "save_every": (0, 10**9),
    "log_every": (1, 10**9),
}
POSITIVE = ("lr", "epochs")

_NAMES = ("model", "data", "held_out", "output")
_EXPECTED = {
    "str": "a name",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
}


def checked_value(name: str, value: Any, annotation: str) -> Any:
    """Check one value against its field's annotation; integers pass as floats, lists as tuples.

    Raises:
        ConfigError: It is of another type, not finite, or out of range.
    """
    if value is None and "None" in annotation:
        return None
    if name == "memory_budget" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name in ("target_modules", "modules_to_save"):
        if isinstance(value, str):
            return value if name == "target_modules" else (value,)
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"`{name}` must be a string or a list of strings, got {value!r:.60}")
    if isinstance(value, Mapping) and "Mapping" in annotation:
        for target, number in value.items():
            if not isinstance(number, int) or isinstance(number, bool):
                raise ConfigError(
                    f"`{name}` for {target!r} must be a whole number, got {number!r:.60}"
                )
        return dict(value)
    expected = annotation.split(" | ")[0]
    if not _fits(value, expected):
        others = ", or one for each target" if "Mapping" in annotation else ""
        raise ConfigError(f"`{name}` must be {_EXPECTED[expected]}{others}, got {_shown(value)}")
    if name in _NAMES and not value.strip():
        raise ConfigError(f"`{name}` must not be empty")
    _check_range(name, value)
    return float(value) if expected == "float" else value


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless a value is one of ``choices``.

    Raises:
        ConfigError: Lists the choices, and names the one that may be meant.
    """
    listed = tuple(choices)
    if value not in listed:
        raise ConfigError(
            f"`{name}` must be one of {', '.join(map(repr, listed))}, got {value!r:.60}"
            f"{did_you_mean(str(value), listed)}"
        )


def _fits(value: Any, expected: str) -> bool:
    if expected in ("str", "bool"):
        return isinstance(value, str if expected == "str" else bool)
    kinds = (int,) if expected == "int" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    # Integers are always finite, and may be too large to be asked.
    return isinstance(value, int) or math.isfinite(value)


def _check_range(name: str, value: Any) -> None:
    if name in POSITIVE and value <= 0:
        raise ConfigError(f"`{name}` must be positive, got {_shown(value)}")
    least, most = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < least:
            raise ConfigError(f"`{name}` must be at least {_shown(least)}, got {_shown(value)}")
        if value > most:
            raise ConfigError(f"`{name}` must be at most {_shown(most)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value for a message; of an endless number, how long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:60]!r}…"
    return repr(value)[:200]
