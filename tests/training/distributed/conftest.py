"""What two processes came to, each case once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.tiny_model import subprocess_environment, write_text, write_tiny_model


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the cases share: a model, a text, and what the cases write."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="package")
def outcomes(place: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process came to, by case."""
    command = ["support.distributed.forked", "support.distributed.run_cases", str(place)]
    subprocess.run(
        [sys.executable, "-m", *command], env=subprocess_environment(), check=True, timeout=900
    )
    found: dict[str, list[dict[str, Any]]] = json.loads((place / "results.json").read_text())
    return found
