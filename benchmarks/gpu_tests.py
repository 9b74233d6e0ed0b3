"""Run the tests that need a GPU and record what passed: ``python -m benchmarks.gpu_tests``.

Options of pytest, such as ``-n 14``, are passed on. The tests marked alone, which time the device,
run one after another when all others are done. Leaves out the tests marked slow, whose upstream
kernels tune themselves for minutes; run them with ``pytest -m "gpu and slow"``. CI has no GPU. It
compares the record's hash with that of every file the tests need, the tests included
(:mod:`benchmarks.harness.sources`), so that a change without a new run on a device is noticed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.sources import ROOT, gpu_test_files, hash_of, needed
from prodial_kernels.files.atomic import atomic_text

RECORD = ROOT / "benchmarks" / "results" / "gpu-tests.json"


class _Counter:
    """A pytest plugin that counts outcomes."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: object) -> None:
        outcome = getattr(report, "outcome", "")
        if getattr(report, "when", "") == "call" or outcome != "passed":
            self.counts[outcome] += 1


def run_tests(options: Sequence[str], counter: _Counter) -> int:
    """Run the tests of a GPU, those that time it in the end and by themselves.

    Args:
        options: Passed on to pytest.
        counter: Counts the outcomes of both runs.

    Returns:
        pytest's exit code of the first run that failed; 0 where none did and there were tests.
    """
    import pytest

    one_process = ["-n", "0"] if find_spec("xdist") else []
    codes = [
        pytest.main(
            ["-q", "-p", "no:benchmark", str(ROOT / "tests"), *options, *more],
            plugins=[counter],
        )
        for more in (
            ["-m", "gpu and not slow and not alone"],
            [*one_process, "-m", "gpu and not slow and alone"],
        )
    ]
    none = pytest.ExitCode.NO_TESTS_COLLECTED
    ran = [code for code in codes if code != none]
    return int(next((code for code in ran if code), 0) if ran else none)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and write the record to ``--output``; return pytest's exit code."""
    import torch
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RECORD)
    options, rest = parser.parse_known_args(arguments)
    # Of what is about to be run: files may be edited meanwhile.
    covered = needed(gpu_test_files())
    sources = hash_of(covered)
    counter = _Counter()
    code = run_tests(rest, counter)
    record = {
        "status": "passed" if code == 0 and counter.counts["failed"] == 0 else "failed",
        "sources": sources,
        "files": len(covered),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": sys.version.split()[0],
        },
        "command": "python -m benchmarks.gpu_tests",
        "counts": counter.counts,
    }
    atomic_text(options.output, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
    return code


if __name__ == "__main__":
    sys.exit(main())
