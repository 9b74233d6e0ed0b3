"""What is made once for all workers of pytest-xdist, as each runs files of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills, called by the first worker that asks; the others wait.

    Where it fails, each worker that asks sees it fail.
    """
    base = tmp_path_factory.getbasetemp()
    # A worker's folder, named after it, lies in that of the run.
    folder = (base.parent if base.name.startswith("popen-") else base) / name
    made = folder / "made"
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
