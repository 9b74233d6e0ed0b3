"""How cost grows: sweeps over one size at a time, and the exponent fitted to each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.harness.text import number, text_table
from benchmarks.projector.cases import Case
from benchmarks.projector.rivals import FLOOR, OURS
from benchmarks.projector.rows import ProjectorRow

MIDDLE = Case(8192, 768, 3072, model="mamba-130m in_proj")

# Name of the size -> the cases along it. K and N grow together with the model, as they do in
# real ones; the widths are those of Mamba 130M to Falcon-Mamba-7B.
SWEEPS: Mapping[str, tuple[Case, ...]] = {
    "m": tuple(replace(MIDDLE, m=m) for m in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    "k": tuple(
        Case(8192, k, 4 * k) for k in (768, 1024, 1536, 2048, 2560, 4096)
    ),
    "p": tuple(replace(MIDDLE, p=p) for p in (1, 6, 12, 24, 48, 96)),
    "r": tuple(replace(MIDDLE, r=r) for r in (4, 8, 16, 32, 64, 128, 256)),
}  # fmt: skip
TINY_SWEEPS: Mapping[str, tuple[Case, ...]] = {
    "m": tuple(Case(m, 24, 40, dtype="float32") for m in (16, 64)),
    "p": tuple(Case(16, 24, 40, p=p, dtype="float32") for p in (1, 12)),
}
_SHOWN = {"m": "M", "k": "K and N", "p": "P", "r": "r"}
# Swept beside ProDiaL and the floor; the strongest of the others where it is strong at all.
RIVAL = "materialised-compiled"
FIGURES = {"time": "both_us", "memory": "peak_mib"}
# Two fits of one sweep differ by less than this from noise alone.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Fit:
    """``figure ≈ c · sizeᵉ`` along one sweep, over the larger half of its sizes.

    Attributes:
        ours: ProDiaL's exponent.
        floor: The frozen layer's.
        needed: That of the operations and bytes that ProDiaL cannot do without; 0 for memory. The
            frozen layer has no blocks and no rank, so in P and r this is what growth is held to.
    """

    size: str
    figure: str
    ours: float
    floor: float
    needed: float

    @property
    def grows_faster(self) -> bool:
        """Whether ProDiaL's cost grows faster than the frozen layer's, and than it must."""
        return self.ours > max(self.floor, self.needed) + TOLERANCE


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x.

    Raises:
        ValueError: Fewer than two different sizes.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x = sum(x for x, _ in logs) / max(1, len(logs))
    mean_y = sum(y for _, y in logs) / max(1, len(logs))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    if len({x for x, _ in logs}) < 2:
        raise ValueError(f"points: expected at least two sizes, got {len(points)} points")
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def series(
    rows: Sequence[ProjectorRow], sweep: Sequence[Case], size: str, rival: str, figure: str
) -> list[tuple[float, float]]:
    """(size, figure) of one rival along a sweep, where it was measured."""
    measured: dict[tuple[object, ...], float] = {}
    for row in rows:
        if row.rival == rival and (value := getattr(row, figure)) is not None:
            measured.setdefault(row.case.key, value)
    return [
        (float(getattr(case, size)), measured[case.key]) for case in sweep if case.key in measured
    ]


def fits(rows: Sequence[ProjectorRow], sweeps: Mapping[str, Sequence[Case]]) -> list[Fit]:
    """Fit every sweep that was measured, over the larger half of its sizes."""
    found = []
    for size, cases in sweeps.items():
        for label, figure in FIGURES.items():
            ours, floor = (
                _tail(series(rows, cases, size, rival, figure)) for rival in (OURS, FLOOR)
            )
            if len(ours) >= 2 and len(floor) >= 2:
                bound = _tail(series(rows, cases, size, OURS, "roofline_us"))
                needed = exponent(bound) if label == "time" and len(bound) >= 2 else 0.0
                found.append(Fit(size, label, exponent(ours), exponent(floor), needed))
    return found


def fits_table(found: Sequence[Fit]) -> str:
    """The exponents as a table."""
    lines = [
        [
            f"{fit.figure} in {_SHOWN[fit.size]}", number(fit.ours), number(fit.floor),
            number(fit.needed) if fit.figure == "time" else "–",
            "grows faster" if fit.grows_faster else "",
        ]
        for fit in found
    ]  # fmt: skip
    return text_table(["exponent of", "ProDiaL", "frozen", "needed", ""], lines)


def _tail(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[-max(2, (len(points) + 1) // 2) :]
