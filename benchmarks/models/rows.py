"""What is measured of one variant of a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import values_of
from benchmarks.harness.store import json_text, write_text


@dataclass
class ModelRow:
    """One variant of one model at one shape; ratios are to ``frozen`` of the same shape.

    Attributes:
        ms: Of a step.
        mib: The allocator's peak of a step by itself.
        allocated_mib, peak_mib, pool_free_mib, reserved_mib: See
            :func:`benchmarks.training.trainer_steps.measure`.
        must: The limits, as text.
        ok: Whether it was measured, or cannot be here, and is within them.
    """

    model: str
    batch: int
    length: int
    variant: str
    status: str = ""
    ms: float | None = None
    mib: float | None = None
    allocated_mib: float | None = None
    peak_mib: float | None = None
    pool_free_mib: float | None = None
    reserved_mib: float | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None
    must: Any = ""
    ok: bool = True

    @property
    def case(self) -> tuple[str, int, int]:
        """Model, batch and length."""
        return self.model, self.batch, self.length

    def judge(self, limits: Sequence[tuple[str, bool]]) -> None:
        """Take limits, as texts and whether each is kept."""
        self.must = ", ".join(text for text, _ in limits)
        self.ok = self.status.startswith(("ok", "unavailable")) and all(kept for _, kept in limits)

    def __str__(self) -> str:
        head = f"{self.model:12} {f'{self.batch}x{self.length}':>7} {self.variant:>12}"
        if self.status != "ok" or self.ms is None:
            return f"{head} {self.status}"
        text = f"{head} {self.ms:9.2f} ms"
        if self.mib is not None:
            text += f" {self.mib:9,.0f} MiB"
        if self.time_ratio is not None:
            text += f" {self.time_ratio:5.2f}x"
        if self.memory_ratio is not None:
            text += f" {self.memory_ratio:5.2f}x"
        if self.peak_mib is not None and self.reserved_mib is not None:
            text += f" {self.peak_mib:8,.0f} MiB ({self.reserved_mib:,.0f} reserved"
            text += f", {self.allocated_mib:,.0f} allocated)" if self.allocated_mib else ")"
        if self.must:
            text += f"  must {self.must}  {'ok' if self.ok else 'MISSED'}"
        return text


def shapes_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(batch, length) of each ``BxL``."""
    return [(int(batch), int(length)) for batch, length in (text.split("x") for text in texts)]


def write_rows(path: Path, record: Mapping[str, Any], rows: Sequence[ModelRow]) -> None:
    """Write the rows as JSON, with what they were measured on."""
    write_text(path, json_text({**record, "rows": [values_of(row) for row in rows]}))
