"""What two processes came to, each case once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.distributed.once import once
from support.tiny_model import subprocess_environment, write_text, write_tiny_model


def run_every_case(folder: Path) -> None:
    write_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    command = ["support.distributed.forked", "support.distributed.run_cases", str(folder)]
    subprocess.run(
        [sys.executable, "-m", *command], env=subprocess_environment(), check=True, timeout=900
    )


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the cases share: a model, a text, and what the cases wrote."""
    return once(tmp_path_factory, "two-processes", run_every_case)


@pytest.fixture(scope="package")
def outcomes(place: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process came to, by case."""
    found: dict[str, list[dict[str, Any]]] = json.loads((place / "results.json").read_text())
    return found
