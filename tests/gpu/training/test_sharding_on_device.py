"""Frozen weights divided between two processes on a device, against a model in one piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.distributed.shard_device_cases import CASES

TESTS = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("shard")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    cases = "support.distributed.shard_device_cases"
    subprocess.run(
        [sys.executable, "-m", "support.distributed.forked", cases, place],
        env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300,
    )  # fmt: skip
    return json.loads((place / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_a_model_in_one_piece(results: dict[str, Any], case: str) -> None:
    for process in results[case]:
        found = process.get("returned")
        assert found, process
        if "skipped" in found:
            pytest.skip(found["skipped"])
        assert found["losses"] < 2e-3, found
        assert found["gradients"] < 5e-2, found
        assert found["values"], found
        assert found["absent"] >= 6 * 4, found
        assert found["still"] == 0 < found["kept"], found
        assert ("all-gather" if case.startswith("coll") else "by copies") in found["said"]
