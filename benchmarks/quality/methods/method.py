"""What a method is: a name, a recipe's range of learning rates, and how it adapts a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["ADAPTER_RATES", "DENSE_RATES", "HEAD", "STATE_RATES", "VECTOR_RATES", "Method", "Unfit"]

HEAD = "head"
"""The classifier of a vision base: it trains with every method, and counts for none."""

ADAPTER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DENSE_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STATE_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
VECTOR_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


class Unfit(ValueError):
    """A method does not exist for a base."""


@dataclass(frozen=True)
class Method:
    """One thing to compare.

    Attributes:
        name: As rows and the command line call it.
        title: For tables.
        apply: Adapts the model in place, to a number of parameters where it can choose, and leaves
            exactly what it trains with ``requires_grad``; the classifier is seen to elsewhere.
        rates: Learning rates of its sweep; every method has four.
        own_size: It has one size; rows are made at the budget ``"own"`` alone.
        families: Bases' kinds that it exists for.
        group: ``"method"``, ``"component"`` (Tables 1 and 2), ``"figure4"`` or ``"placement"``.
    """

    name: str
    title: str
    apply: Callable[[nn.Module, int], None]
    rates: tuple[float, ...] = ADAPTER_RATES
    own_size: bool = False
    families: tuple[str, ...] = ("language", "vision")
    group: str = "method"
    about: dict[str, Any] = field(default_factory=dict)
