"""Rows as tables that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness.rows import ratio
from benchmarks.harness.text import number, text_table
from benchmarks.projector.cases import BLOCK_SIZES, block_size
from benchmarks.projector.rivals import FLOOR, OURS
from benchmarks.projector.rows import ProjectorRow, find
from benchmarks.targets import VARIANT_LIMIT, Limits, of_projector

Rows = Sequence[ProjectorRow]

COLUMNS: Sequence[tuple[str, Callable[[ProjectorRow], str]]] = (
    ("µs", lambda row: number(row.both_us, 1)),
    ("± %", lambda row: number(row.spread, 1, 50)),
    ("× frozen", lambda row: number(row.ratio)),
    ("forward µs", lambda row: number(row.forward_us, 1)),
    ("eager µs", lambda row: number(row.eager_us, 0)),
    ("host µs", lambda row: number(row.host_us, 0)),
    ("peak MiB", lambda row: number(row.peak_mib, 1)),
    ("kept MiB", lambda row: number(row.kept_mib, 1)),
    ("TFLOP/s", lambda row: number(row.tflops, 0)),
    ("GB/s", lambda row: number(row.gbps, 0)),
    ("% roof", lambda row: number(row.roofline_fraction, 0, 100)),
    ("error", lambda row: f"{row.error:.1e}"),
    ("unrounded", lambda row: number(row.unrounded_error, 4)),
)
# What any row has.
_OF_ALL = ("µs", "± %", "× frozen", "peak MiB", "% roof", "error")


def case_table(rows: Rows) -> str:
    """Every figure of one case, a line for each rival; what was refused is said below."""
    measured = [row for row in rows if row.status == "ok"]
    lines = [[row.rival, *(show(row) for _, show in COLUMNS)] for row in measured]
    head = rows[0]
    title = f"{head.m},{head.k},{head.n}  P={head.p} r={head.r} {head.dtype}"
    notes = [f"  {row.rival}: {row.status}" for row in rows if row.status != "ok"]
    table = [text_table(["rival", *(name for name, _ in COLUMNS)], lines)] if lines else []
    return "\n".join([f"{title}  {head.model}".rstrip(), *table, *notes])


def list_table(rows: Rows) -> str:
    """The figures that any row has, a line for each row."""
    columns = [(name, show) for name, show in COLUMNS if name in _OF_ALL]
    lines = [
        [row.title, row.rival, *(show(row) for _, show in columns)]
        if row.status == "ok"
        else [row.title, f"{row.rival}: {row.status}", *[""] * len(columns)]
        for row in rows
    ]
    return text_table(["case", "rival", *(name for name, _ in columns)], lines)


def targets_table(rows: Rows, device: str) -> str:
    """One line for each shape and rank: ProDiaL against its targets on a device and the best rival.

    Variants of a shape (other block sizes and ranks, part ``"variants"``) are columns of its line.
    """
    base: dict[tuple[int, ...], ProjectorRow] = {}
    for row in rows:
        if row.part == "table" and row.rival == OURS and row.status == "ok":
            base.setdefault((*row.case.shape, row.r), row)
    _, host_us = of_projector(device)
    headers = [
        "M,K,N,r", "frozen µs", "must", "aim", "ProDiaL", "", "best rival", "",
        *(f"P={p}" for p in BLOCK_SIZES), "r ×4", "memory", "host µs",
    ]  # fmt: skip
    note = (
        "ProDiaL and the rivals: × the frozen layer, at the first P of each shape. "
        f"P (or the next power of two that divides K) and r ×4: × that, at most {VARIANT_LIMIT}. "
        "Memory: peak × frozen, at most what benchmarks/targets.py says. "
        f"Host: at most {host_us:.0f} µs. '!' marks what misses."
    )
    lines = [_target_line(rows, row, device) for row in base.values()]
    return text_table(headers, lines) + "\n" + note


def _target_line(rows: Rows, base: ProjectorRow, device: str) -> list[str]:
    floor = find(rows, rival=FLOOR, **base.at)
    limits, host_us = of_projector(device)
    limit = limits.get((*base.case.shape, base.r), Limits())
    best = best_rival(rows, base.at)
    beaten = best is None or base.ratio is None or base.ratio < (best.ratio or 0.0)

    def against_base(**changed: int) -> str:
        row = find(rows, rival=OURS, **(base.at | changed))
        # The floor of each case was measured beside it: compare ratios, not times.
        return _limited(ratio(row.ratio if row else None, base.ratio), VARIANT_LIMIT)

    return [
        ",".join(map(str, (*base.case.shape, base.r))), number(floor.both_us if floor else None, 1),
        number(limit.must), number(limit.aim), number(base.ratio), _verdict(base.ratio, limit),
        f"{best.rival} {number(best.ratio)}" if best else "–", "" if beaten else "!",
        *(against_base(p=block_size(p, base.k)) for p in BLOCK_SIZES), against_base(r=4 * base.r),
        _limited(base.memory_ratio, limit.memory),
        _limited(base.host_us, host_us, 0),
    ]  # fmt: skip


def _verdict(taken: float | None, limit: Limits) -> str:
    """What of its targets a row reaches, or a mark; nothing where it has no floor or no target."""
    if taken is None:
        return ""
    if limit.aim is not None and taken <= limit.aim:
        return "aim"
    if limit.must is None:
        return ""
    return "must" if taken <= limit.must else "!"


def best_rival(rows: Rows, at: dict[str, Any]) -> ProjectorRow | None:
    """The fastest other way to train these projectors at this case, whatever method it computes."""
    others = [
        row
        for row in rows
        if row.ratio is not None and row.rival not in (FLOOR, OURS) and row.at == at
    ]
    return min(others, key=lambda row: row.both_us or 0.0, default=None)


def _limited(value: float | None, limit: float | None, digits: int = 2) -> str:
    missed = value is not None and limit is not None and value > limit
    return number(value, digits) + ("!" if missed else "")
