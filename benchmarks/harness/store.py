"""Results on disk: JSON with everything, CSV with the flat figures, Markdown to read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ROOT, slug

RESULTS = ROOT / "benchmarks" / "results"


def folder_of(record: Mapping[str, Any], output: Path | None = None) -> Path:
    """``benchmarks/results/<device>/``, or the folder asked for."""
    return output or RESULTS / slug(record["environment"]["device"])


def write(record: Mapping[str, Any], folder: Path, page: str) -> tuple[Path, ...]:
    """Write ``<name>.json``, ``.csv`` and ``.md`` and return their paths.

    A run writes them again and again: what is there is whole at any time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [flatten(row) for row in (*record["rows"], *record["modules"])]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        ".json": json.dumps(record, indent=1, allow_nan=False) + "\n",
        ".csv": table.getvalue(),
        ".md": page + "\n",
    }
    paths = []
    for suffix, text in texts.items():
        path = folder / f"{record['name']}{suffix}"
        unfinished = path.with_suffix(f"{suffix}.new")
        unfinished.write_text(text)
        unfinished.replace(path)
        paths.append(path)
    return tuple(paths)


def read(path: Path) -> dict[str, Any]:
    """Read a result written by :func:`write`.

    Raises:
        ValueError: The file is not one.
    """
    record: dict[str, Any] = json.loads(path.read_text())
    if not {"environment", "rows", "modules", "sweeps", "name"} <= record.keys():
        raise ValueError(f"{path} is not a result of benchmarks.run")
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
