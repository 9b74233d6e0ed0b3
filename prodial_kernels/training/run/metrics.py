"""``metrics.jsonl``: one line for each logged step and each evaluation, without duplicates.

Training lines have ``"kind": "train"`` and the step that they finish; evaluation lines have
``"kind": "evaluation"`` and the steps done before it. ``"kind": "stop"`` says that a callback ended
training after that step.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prodial_kernels.files.atomic import atomic_text
from prodial_kernels.files.json_values import finite_or_none


class MetricsLog:
    """Appends records to a file, each on the disk's side of the program before the next step."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Open the file to continue after ``step``: whatever belongs to later is removed.

        ``dropped`` then counts the lines that are none of a run's.

        An evaluation at ``step`` itself is removed too, because a run saves its state first and
        then evaluates: a resumed run does it again. So is a line that a killed process left
        unfinished.

        Raises:
            OSError: The disk is full, or the file cannot be written.
        """
        self.path = path
        records = read_metrics(path)
        kept = [r for r in records if (r["step"], r["kind"] == "evaluation") <= (step, False)]
        self.dropped = (path.read_bytes().count(b"\n") if path.exists() else 0) - len(records)
        atomic_text(path, "".join(_line(record) for record in kept))
        # Not where a link leads, if there is one by now.
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        self._stream = os.fdopen(os.open(path, flags), "a", encoding="utf-8")
        self._file = _identity(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, null for what JSON cannot hold; OSError if the file has gone."""
        try:
            if _identity(self.path) != self._file:
                raise OSError(errno.ESTALE, "was replaced while the run was writing it")
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
    """Return the complete records of a file, in order; none if there is no file.

    A record has a ``kind`` and a ``step`` as said above, and numbers or null for the rest.

    Raises:
        OSError: It cannot be read.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            records.append(record)
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("kind") not in ("train", "evaluation", "stop"):
        return False
    numbers = [value for name, value in record.items() if name != "kind"]
    step = record.get("step")
    return (
        type(step) is int
        and step >= 0
        and all(v is None or type(v) in (int, float) for v in numbers)
        and (record["kind"] != "train" or "loss" in record)
    )


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite_or_none(record), allow_nan=False) + "\n"
