"""Running a script of this folder, or beside it, where Triton compiles, whatever tests do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import prodial_kernels

HERE = Path(__file__).resolve().parent


def run_uninterpreted(cache: Path, script: str, *arguments: str) -> None:
    """Run ``script`` in its own process, which sees no GPU and compiles into ``cache``.

    Raises:
        AssertionError: It failed; the message is what it printed.
    """
    package = str(Path(prodial_kernels.__file__).resolve().parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(
            filter(None, (package, str(HERE.parents[1]), environment.get("PYTHONPATH")))
        ),
        "PYTHONWARNINGS": "ignore",
    }
    finished = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr[-4000:]
