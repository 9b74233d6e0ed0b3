"""Results on disk: JSON with everything, CSV with the flat figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, slug

RESULTS = ROOT / "benchmarks" / "results"


def folder_of(record: Mapping[str, Any], output: Path | None = None) -> Path:
    """``benchmarks/results/<device>/``, or the folder asked for."""
    return output or RESULTS / slug(record["environment"]["device"])


def write(record: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``<date>-<name>.json`` and ``.csv`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['environment']['date']}-{record['name']}"
    as_json, as_csv = folder / f"{stem}.json", folder / f"{stem}.csv"
    as_json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    rows = [flatten(row) for row in record["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return as_json, as_csv


def read(path: Path) -> dict[str, Any]:
    """Read a result written by :func:`write`.

    Raises:
        ValueError: The file is not one.
    """
    record: dict[str, Any] = json.loads(path.read_text())
    if not {"environment", "rows", "name"} <= record.keys():
        raise ValueError(f"load: {path} is not a result of benchmarks.run")
    return record


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what does not fit in one cell."""
    return {name: value for name, value in row.items() if not isinstance(value, (dict, list))}


def find(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    """The first measured row with these values, or None."""
    for row in rows:
        if row["status"] == "ok" and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None
