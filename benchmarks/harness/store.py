"""Results on disk: JSON with everything, CSV with the flat figures. Whole at any time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ROOT, slug
from prodial_kernels.files.atomic import atomic_text

RESULTS = ROOT / "benchmarks" / "results"


def results_of(device: str) -> Path:
    """The folder of a device, by its name."""
    return RESULTS / slug(device)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_text(path, text)


def json_text(data: Mapping[str, Any], indent: int = 2) -> str:
    """JSON as all results have it."""
    return json.dumps(data, indent=indent, allow_nan=False) + "\n"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for each name in any row, without what does not fit in one cell."""
    cells = [
        {name: value for name, value in row.items() if not isinstance(value, (dict, list))}
        for row in rows
    ]
    table = io.StringIO()
    columns = list(dict.fromkeys(name for row in cells for name in row))
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return table.getvalue()
