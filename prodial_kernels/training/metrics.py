"""``metrics.jsonl``: one line for each logged step and each evaluation, without duplicates.

Training lines have ``"kind": "train"`` and the step that they finish; evaluation lines have
``"kind": "evaluation"`` and the steps done before it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prodial_kernels.training.atomic import atomic_text


class MetricsLog:
    """Appends records to a file, each on the disk's side of the program before the next step."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Open the file to continue after ``step``: whatever belongs to later is removed.

        An evaluation at ``step`` itself is removed too, because a run saves its state first and
        then evaluates: a resumed run does it again. So is a line that a killed process left
        unfinished.

        Raises:
            OSError: The disk is full, or the file cannot be written.
        """
        self.path = path
        kept = [r for r in read_metrics(path) if _belongs_before(r, step)]
        atomic_text(path, "".join(_line(record) for record in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that JSON cannot hold become null.

        Raises:
            OSError: The disk is full.
        """
        try:
            self._stream.write(_line(record))
            self._stream.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def flush(self) -> None:
        """Bring everything written to the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; what could not be written has been reported by :meth:`write`."""
        with suppress(OSError):
            self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete records of a file, in order; none if there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _belongs_before(record: Mapping[str, Any], step: int) -> bool:
    return bool(record["step"] < step or (record["step"] == step and record["kind"] == "train"))


def _line(record: Mapping[str, Any]) -> str:
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"
