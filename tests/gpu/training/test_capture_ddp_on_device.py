"""Captured blocks in DistributedDataParallel on two GPUs, against DistributedDataParallel alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.captured.ddp_device_cases import CASES

TESTS = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_are_those_of_ddp_alone(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    cases = "support.captured.ddp_device_cases"
    subprocess.run(
        [sys.executable, "-m", "support.distributed.forked", cases, tmp_path],
        env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == CASES.keys()
    for case, processes in results.items():
        for process in processes:
            found = process.get("returned")
            assert found, (case, process)
            # Upstream's kernels sum in no fixed order: the same steps again differ too.
            assert found["losses"] < 2e-3 + 2 * found["losses again"], (case, found)
            assert found["updates"] < 5e-2 + 2 * found["updates again"], (case, found)
            assert found["alike"], case
            assert "4 of 4" in found["said"], (case, found)
