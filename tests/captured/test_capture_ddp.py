"""Captured blocks in DistributedDataParallel: two processes, graphs that a CPU stands in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.captured.ddp_cases import CASES

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("ddp")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "support.distributed.forked", "support.captured.ddp_cases", place],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=300,
    )  # fmt: skip
    return json.loads((place / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_ddp_alone(results: dict[str, Any], case: str) -> None:
    for result in results[case]:
        assert result.get("returned"), result
        assert all(result["returned"].values()), result
