"""What a word of the command line may be: numbers, counts, sizes by target."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

from prodial_kernels.training.config import ConfigError

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def integer(text: str) -> int:
    """Parse a whole number such as 8."""
    if not re.fullmatch(r"[+-]?\d{1,100}", text):
        raise ArgumentTypeError(f"expected a whole number such as 8, got {text!r:.60}")
    return int(text)


def number(text: str) -> float:
    """Parse a number such as 0.001 or 1e-3."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number such as 0.001, got {text!r:.60}") from None


def count(text: str) -> int:
    """Parse a count such as 500, 64k or 4M."""
    match = re.fullmatch(r"([+-]?\d{1,100})([kKmMgG]?)", text)
    if match is None:
        raise ArgumentTypeError(f"expected a number such as 500, 64k or 4M, got {text!r:.60}")
    return int(match.group(1)) * _UNITS[match.group(2).lower()]


def at_least(least: int, parse: Callable[[str], int] = integer) -> Callable[[str], int]:
    """Return a parser of numbers that refuses what is under ``least``."""

    def parsed(text: str) -> int:
        value = parse(text)
        if value < least:
            raise ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return parsed


def share_or_count(text: str) -> float:
    """Parse a whole number from 1 on, or a share between 0 and 1."""
    value = number(text)
    if not (0 < value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))):
        raise ArgumentTypeError(
            f"expected a whole number from 1 on, or a share between 0 and 1, got {text!r:.60}"
        )
    return value


def per_target(text: str) -> tuple[str | None, int]:
    """Parse ``64`` or ``in_proj=64``."""
    name, equals, digits = text.rpartition("=")
    if not re.fullmatch(r"\d{1,18}", digits) or (equals and not name):
        raise ArgumentTypeError(
            f"expected a number, or NAME=NUMBER such as in_proj=64, got {text!r:.60}"
        )
    return name or None, int(digits)


def merged_blocks(option: str, parts: list[tuple[str | None, int]]) -> int | dict[str, int]:
    """Return one number, or the numbers by target.

    Raises:
        ConfigError: Several numbers, not all of them with a target.
    """
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    named = {name: number for name, number in parts if name is not None}
    if len(named) != len(parts):
        raise ConfigError(f"`{option}`: give one number, or a NAME=NUMBER for every target")
    return named
