"""What a run's record holds, as text and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.models.modules import grown, layers_view, modules_view
from benchmarks.projector import views
from benchmarks.projector.cases import Case
from benchmarks.projector.scaling import fits, fits_view

Record = Mapping[str, Any]
MODULE_PARTS = ("mixer", "step")


def add(record: dict[str, Any], part: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put a job's rows where they belong."""
    if part in MODULE_PARTS:
        record["modules"] += rows
    elif part == "breakdown":
        for row in rows:
            _add_kernels(record, row)
    else:
        record["rows"] += [{**row, "part": part} for row in rows]


def _add_kernels(record: Record, row: Mapping[str, Any]) -> None:
    """A breakdown belongs to a row that is there already."""
    key = {name: row[name] for name in ("m", "k", "n", "p", "r", "dtype", "rival")}
    for known in record["rows"]:
        if all(known[name] == value for name, value in key.items()):
            known["kernels_us" if row["status"] == "ok" else "kernels_status"] = (
                row["kernels_us"] if row["status"] == "ok" else row["status"]
            )


def of_job(part: str, rows: Sequence[dict[str, Any]], *, quick: bool) -> str:
    """What is said as soon as one job is done: tables of whole cases, and what went wrong."""
    if part == "table" and not quick:
        return views.case_view(rows)
    if part in MODULE_PARTS:
        return modules_view(rows)
    case = "{m},{k},{n} P={p} r={r}".format(**rows[0])
    notes = [
        f"  {row['rival']}: {row['status']}" for row in rows if row["status"] not in ("ok", "")
    ]
    return "\n".join([f"{part} {case}", *notes]) if notes else ""


def ceilings_line(record: Record) -> str:
    """What the device can do."""
    ceilings = record["ceilings"]
    return (
        f"{record['environment']['device']}: {ceilings['flops'] / 1e12:.0f} TFLOP/s in a large "
        f"product, {ceilings['bandwidth'] / 1e9:.0f} GB/s in a copy"
    )


def summary(record: Record) -> str:
    """The table against the targets, the exponents, and what is missing."""
    parts = []
    if any(row["part"] == "table" for row in record["rows"]):
        parts.append(views.targets_view(record["rows"]))
    if swept := fits(record["rows"], sweeps_of(record)):
        parts.append(fits_view(swept))
    if grown(record["modules"]):
        parts.append(layers_view(record["modules"]))
    if record["dropped"]:
        parts.append("dropped, as the time was over: " + "; ".join(record["dropped"]))
    spent = ", ".join(f"{name} {took:.0f} s" for name, took in record["seconds"].items())
    parts.append(f"{record['environment']['command']}: {spent}")
    return "\n\n".join(parts)


def tables(record: Record) -> str:
    """Everything that the command prints, as one page."""
    environment = record["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    parts = [
        f"{environment['device']}, driver {environment['driver']}, {versions}\n"
        f"commit {environment['commit']}, {environment['date']}, `{environment['command']}`"
    ]
    if record["ceilings"]:
        parts.append(ceilings_line(record))
    parts.append(summary(record))
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["part"] == "table":
            key = tuple(row[name] for name in ("m", "k", "n", "p", "r", "dtype"))
            cases.setdefault(key, []).append(row)
        else:
            others.setdefault(row["part"], []).append(row)
    parts += [views.case_view(rows) for rows in cases.values()]
    parts += [f"{part}\n{views.list_view(rows)}" for part, rows in others.items()]
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in record["modules"]:
        key = tuple(row[name] for name in ("level", "model", "batch", "length", "layers"))
        blocks.setdefault(key, []).append(row)
    parts += [modules_view(rows) for rows in blocks.values()]
    return "\n\n".join(parts)


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw what the record has figures for; return the files written."""
    if not store.find(record["rows"]):
        return []
    # Loading it takes seconds, which a run that ends before has to spare.
    from benchmarks.report.charts import draw_all

    return draw_all(record, sweeps_of(record), folder)


def sweeps_of(record: Record) -> dict[str, tuple[Case, ...]]:
    """The cases along each size."""
    return {size: tuple(Case(**case) for case in cases) for size, cases in record["sweeps"].items()}
