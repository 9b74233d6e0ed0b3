"""What is measured of one rival on one case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.rows import ratio
from benchmarks.projector.cases import Case
from benchmarks.projector.rivals import FLOOR


@dataclass
class ProjectorRow:
    """One rival on one case, as the results have it; benchmarks/README.md explains the figures.

    Attributes:
        m, k, n, p, r, dtype, model: The :class:`~benchmarks.projector.cases.Case`.
        rival: Name of one of :data:`~benchmarks.projector.rivals.RIVALS`.
        method: What it computes.
        status: See :mod:`benchmarks.harness.rows`.
        part: Which part of a run measured it.
        kernels_us: Device time of a step by kernel; ``kernels_status`` says why there is none.
    """

    m: int
    k: int
    n: int
    p: int
    r: int
    dtype: str
    model: str
    rival: str
    method: str = ""
    status: str = ""
    both_us: float | None = None
    both_low_us: float | None = None
    both_high_us: float | None = None
    spread: float | None = None
    samples: int | None = None
    peak_mib: float | None = None
    held_mib: float | None = None
    kept_mib: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline_us: float | None = None
    roofline_fraction: float | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    worst_gradient: str | None = None
    unrounded_error: float | None = None
    forward_us: float | None = None
    backward_us: float | None = None
    eager_us: float | None = None
    host_us: float | None = None
    ratio: float | None = None
    memory_ratio: float | None = None
    part: str = "table"
    kernels_us: dict[str, float] | None = None
    kernels_status: str | None = None

    @classmethod
    def of(cls, case: Case, rival: str, status: str = "", **more: Any) -> ProjectorRow:
        """A row of a case, without figures as yet."""
        return cls(**asdict(case), rival=rival, status=status, **more)

    @property
    def case(self) -> Case:
        """What was measured."""
        return Case(**self.at, model=self.model)

    @property
    def at(self) -> dict[str, Any]:
        """What tells the cases apart, as :func:`find` takes it."""
        return {name: getattr(self, name) for name in ("m", "k", "n", "p", "r", "dtype")}

    @property
    def error(self) -> float:
        """The larger of the output's relative error and the worst gradient's; 0 unchecked."""
        return max(self.output_error or 0.0, self.gradient_error or 0.0)

    @property
    def title(self) -> str:
        """The case in a table of several."""
        return f"{self.m},{self.k},{self.n} P={self.p} r={self.r}"


def find(rows: Iterable[ProjectorRow], **wanted: Any) -> ProjectorRow | None:
    """The first measured row with these values, or None."""
    for row in rows:
        if row.status == "ok" and all(getattr(row, n) == value for n, value in wanted.items()):
            return row
    return None


def by_case(rows: Iterable[ProjectorRow]) -> list[list[ProjectorRow]]:
    """Rows of the same case together, in the order of their first."""
    cases: dict[tuple[Any, ...], list[ProjectorRow]] = {}
    for row in rows:
        cases.setdefault(tuple(row.at.values()), []).append(row)
    return list(cases.values())


def add_ratios(rows: dict[str, ProjectorRow]) -> None:
    """Add time and memory over the floor's, where both were measured."""
    floor = rows.get(FLOOR)
    for row in rows.values():
        if floor is not None and row.status == floor.status == "ok":
            row.ratio = ratio(row.both_us, floor.both_us)
            row.memory_ratio = ratio(row.peak_mib, floor.peak_mib)
