"""A number or a choice that step two of a search varies, as optuna sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Knob:
    """A number, or a choice, that step two of a search varies.

    Attributes:
        name: Its name.
        default: What it is in step one.
        choices: Its possible values; empty for a number in ``range``.
        range: Smallest and largest number, tried evenly by their logarithm.
        powers: Whether only powers of two are tried.
    """

    name: str
    default: Any
    choices: tuple[Any, ...] = ()
    range: tuple[float, float] = (1.0, 1.0)
    powers: bool = False

    def suggest(self, trial: Any, name: str) -> Any:
        """Let a trial of optuna choose the value, as its parameter ``name``."""
        low, high = self.range
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if self.powers:
            return 2 ** trial.suggest_int(name, _log2(low), _log2(high))
        return trial.suggest_float(name, low, high, log=True)

    def parameter(self, value: Any) -> Any:
        """Return the parameter of optuna that stands for a value."""
        return _log2(value) if self.powers else value


def as_parameters(knobs: Mapping[str, Knob], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of optuna that stand for the values of knobs, by name."""
    return {name: knob.parameter(values[name]) for name, knob in knobs.items()}


def _log2(value: float) -> int:
    return int(value).bit_length() - 1
