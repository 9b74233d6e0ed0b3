"""What runs the tests of a GPU: those that time it by themselves, outcomes added up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_tests

NONE = pytest.ExitCode.NO_TESTS_COLLECTED


class Report:
    when = "call"

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((1, 0), 1), ((0, 1), 1), ((2, 1), 2), ((NONE, 0), 0), ((0, NONE), 0),
     ((NONE, NONE), NONE)],
)  # fmt: skip
def test_both_runs_count(
    codes: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def run(arguments: list[str], plugins: list[Any]) -> int:
        calls.append(arguments)
        code = codes[len(calls) - 1]
        if code != NONE:
            plugins[0].pytest_runtest_logreport(Report("failed" if code else "passed"))
        return code

    monkeypatch.setattr(pytest, "main", run)
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: "xdist, installed or not")
    record = tmp_path / "record.json"
    assert gpu_tests.main(["--output", str(record), "-n", "14", "--durations=3"]) == expected
    written = json.loads(record.read_text())
    assert written["status"] == ("passed" if expected == 0 else "failed")
    ran = [code for code in codes if code != NONE]
    assert written["counts"] == {
        "passed": ran.count(0), "failed": len(ran) - ran.count(0), "skipped": 0
    }  # fmt: skip
    together, alone = calls
    assert "--durations=3" in together
    assert "--durations=3" in alone
    # pytest takes the last of each.
    assert together[together.index("-n") + 1] == "14"
    assert alone[len(alone) - 1 - alone[::-1].index("-n") + 1] == "0"
    assert together[-1] == "gpu and not slow and not alone"
    assert alone[-1] == "gpu and not slow and alone"
