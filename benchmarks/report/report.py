"""What a run's record holds, as text and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.models.modules import ModuleRow, grown, layers_table, modules_table
from benchmarks.projector import tables
from benchmarks.projector.rows import ProjectorRow, by_case, find
from benchmarks.projector.scaling import fits, fits_table
from benchmarks.report.record import Record


def of_job(part: str, rows: Sequence[ProjectorRow] | Sequence[ModuleRow], *, quick: bool) -> str:
    """What is said as soon as one job is done: tables of whole cases, and what went wrong."""
    modules = [row for row in rows if isinstance(row, ModuleRow)]
    if modules:
        return modules_table(modules)
    projectors = [row for row in rows if isinstance(row, ProjectorRow)]
    if part == "table" and not quick:
        return tables.case_table(projectors)
    notes = [f"  {row.rival}: {row.status}" for row in projectors if row.status not in ("ok", "")]
    return "\n".join([f"{part} {projectors[0].title}", *notes]) if notes else ""


def ceilings_line(record: Record) -> str:
    """What the device can do; empty where that was not measured."""
    if record.ceilings is None:
        return ""
    return (
        f"{record.environment['device']}: {record.ceilings.flops / 1e12:.0f} TFLOP/s in a large "
        f"product, {record.ceilings.bandwidth / 1e9:.0f} GB/s in a copy"
    )


def summary(record: Record) -> str:
    """The table against the targets, the exponents, and what is missing."""
    parts = []
    if any(row.part == "table" for row in record.rows):
        parts.append(tables.targets_table(record.rows, record.environment["device"]))
    if swept := fits(record.rows, record.sweeps):
        parts.append(fits_table(swept))
    if grown(record.modules):
        parts.append(layers_table(record.modules))
    if record.dropped:
        parts.append("dropped, as the time was over: " + "; ".join(record.dropped))
    spent = ", ".join(f"{name} {took:.0f} s" for name, took in record.seconds.items())
    parts.append(f"{record.environment['command']}: {spent}")
    return "\n\n".join(parts)


def page(record: Record) -> str:
    """Everything that the command prints, as one page."""
    environment = record.environment
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    parts = [
        f"{environment['device']}, driver {environment['driver']}, {versions}\n"
        f"commit {environment['commit']}, {environment['date']}, `{environment['command']}`",
        ceilings_line(record),
        summary(record),
    ]
    others: dict[str, list[ProjectorRow]] = {}
    for row in record.rows:
        others.setdefault(row.part, []).append(row)
    parts += [tables.case_table(rows) for rows in by_case(others.pop("table", ()))]
    parts += [f"{part}\n{tables.list_table(rows)}" for part, rows in others.items()]
    blocks: dict[tuple[object, ...], list[ModuleRow]] = {}
    for block in record.modules:
        key = (block.level, block.model, block.batch, block.length, block.layers)
        blocks.setdefault(key, []).append(block)
    parts += [modules_table(rows) for rows in blocks.values()]
    return "\n\n".join(filter(None, parts))


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw what the record has figures for; return the files written."""
    if not find(record.rows):
        return []
    # Loading it takes seconds, which a run that ends before has to spare.
    from benchmarks.report.charts import draw_all

    return draw_all(record, folder)
