"""Partial LoRA: a low-rank term on some output rows of a mixer's projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels.methods.base import Method, option

ROWS = ("X", "Z", "d", "B", "C")


@dataclass(frozen=True)
class PartialLora(Method):
    """LoRA whose B covers only the output rows of one part of a projection; it starts at 0.

    Attributes:
        rows: ``"X"`` and ``"Z"``, the halves of ``in_proj``; ``"d"``, ``"B"`` and ``"C"``, the
            parts of ``x_proj`` that give the step size and the recurrence's B and C. Each part gets
            a term of its own.
        r: Rank of each term.
        alpha: LoRA's numerator: α = alpha / r. Default: r.
        dropout: Dropout probability on the term's input in training mode, in [0, 1).
    """

    name: ClassVar[str] = "partial-lora"

    rows: tuple[str, ...] = option(
        ("X",), "parts of in_proj (X, Z) and x_proj (d, B, C) that get a term each", choices=ROWS
    )
    r: int = option(16, "rank of each term")
    alpha: float | None = option(None, "numerator of a term's factor alpha / r; default: r")
    dropout: float = option(0.0, "dropout on a term's input")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._freeze_names("rows", ROWS)
        self._check_low_rank()
