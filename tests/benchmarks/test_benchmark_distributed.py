"""The benchmark of several GPUs: what it says of rows, and the smallest of its measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import distributed
from benchmarks.training import scaling, shared_gradients, shared_tables
from benchmarks.training.distributed_models import TINY
from prodial_kernels.training.distributed.world import ONE_PROCESS

AGAIN = shared_gradients.AGAIN


def gradient(way: str, ulps: float) -> dict[str, Any]:
    row = {
        "part": "gradients", "model": "mamba2", "dtype": "bfloat16", "base": "dense", "way": way,
        "ulps": ulps, "median_ulps": ulps / 2, "worst": "a", "equal": 0 if ulps else 16,
        "parameters": 16,
    }  # fmt: skip
    return row if way.startswith("one GPU") else {**row, "beside": AGAIN}


def speed(processes: int, tokens: float, way: str = "") -> dict[str, Any]:
    return {
        "part": "scaling", "model": "mamba-1.4b", "processes": processes, "way": way,
        "ms": 1.0, "tokens_per_second": tokens, "peak_gb": 1.0,
    }  # fmt: skip


def a_run(what: str, apart: float) -> dict[str, Any]:
    return {"part": "runs", "what": what, "farthest_loss": apart, "equal": not apart}


def test_what_is_as_it_must_be() -> None:
    rows = [
        gradient(AGAIN, 40.0), gradient("two GPUs", 79.0),
        # Another way on one GPU is not judged, and says nothing of this noise.
        gradient("one GPU, the batch at once", 999.0), speed(1, 100.0), speed(2, 191.0),
        a_run("one GPU, again", 0.0), a_run("torchrun, two GPUs", 5e-5),
    ]  # fmt: skip
    # Another way to divide than the one that is taken need not reach it.
    rows.append({**speed(2, 150.0, "FSDP2"), "default": False})
    distributed.add_ratios(rows)
    assert distributed.failed(rows) == []
    shown = distributed.table(rows)
    assert "1.91×" in shown
    assert "every figure equal" in shown


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([gradient(AGAIN, 0.1), gradient("two GPUs", 5.0)], "two GPUs: 5 ulps"),
        ([gradient(AGAIN, 0.1), gradient("two GPUs", float("nan"))], "nan"),
        ([speed(1, 100.0), speed(2, 189.0)], "mamba-1.4b: 1.89 times one GPU"),
        ([a_run("one GPU, again", 0.0), a_run("torchrun", 2e-4)], "torchrun: losses 0.0002 apart"),
        ([{"part": "scaling", "error": "processes ended with [1, 0]"}], "ended with [1, 0]"),
        (
            [{**gradient("two GPUs, DDP", 0.0), "error": "RuntimeError: no"}],
            "DDP: RuntimeError: no",
        ),
    ],
)
def test_what_is_not(rows: list[dict[str, Any]], said: str) -> None:
    distributed.add_ratios(rows)
    (message,) = distributed.failed(rows)
    assert said in message
    assert distributed.table(rows)


def test_parts_of_several_commands_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "distributed.json"
    for part, command in (("scaling", "a"), ("gradients", "b"), ("scaling", "c")):
        distributed.store(file, part, {"command": command, "rows": []})
    parts = json.loads(file.read_text())["parts"]
    assert [(name, part["command"]) for name, part in parts.items()] == [
        ("gradients", "b"), ("scaling", "c")
    ]  # fmt: skip


def test_tables_of_a_readme() -> None:
    rows = [
        gradient(AGAIN, 0.0), gradient("two GPUs", 30.0), {"part": "gradients", "error": "no\nno"}
    ]  # fmt: skip
    lines = shared_tables.part_text("gradients", rows, "2 GPUs").splitlines()
    assert [line.strip("| ").split() for line in lines if line.startswith("| two")] == [
        ["two", "GPUs", "|", "15", "(30)"]
    ]
    assert lines[-1] == "Failed: gradients: no."
    speeds = [speed(1, 100.0), {**speed(2, 1500.0), "nccl_ms": 30.0, "nccl_beside_others_ms": 20.0}]
    distributed.add_ratios(speeds)
    shown = shared_tables.part_text("sharded", speeds, "2 GPUs")
    assert "|    1,500 | 15.000 |      1.0 |   30 (20) |" in shown
    assert "| torchrun |      5.0e-05 |" in shared_tables.part_text(
        "runs", [a_run("torchrun", 5e-5)], ""
    )


def test_what_measures_no_time_goes_side_by_side() -> None:
    assert distributed.batches(distributed.PARTS) == [
        ["gradients", "runs"],
        ["sharded"],
        ["scaling"],
    ]
    assert distributed.batches(["runs", "sharded", "gradients"]) == [
        ["runs"], ["sharded"], ["gradients"]
    ]  # fmt: skip


def test_it_needs_two_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.main([]) == 2
    assert "this needs 2 GPUs" in capsys.readouterr().err


def test_gradients_of_one_process() -> None:
    """The same again is the same; a batch at once is rounding away; a wrong one is far."""
    case = shared_gradients._Case(
        ONE_PROCESS, torch.device("cpu"), TINY["mamba2"], torch.float32, None, 4, 16
    )
    case.step(case.halves)
    case.reference = case.taken()
    case.step(case.halves)
    assert case.compared() == {
        "ulps": 0.0, "median_ulps": 0.0, "worst": case.compared()["worst"], "equal": 32,
        "parameters": 32,
    }  # fmt: skip
    case.step(case.all)
    assert 0 < case.compared()["ulps"] < 4
    case.step(case.halves[:1])
    assert case.compared()["ulps"] > 1e5


def test_a_way_that_fails_is_a_row_and_the_rest_goes_on() -> None:
    """As all that need a process group, where there is none."""
    rows = [*shared_gradients.gradients(ONE_PROCESS, torch.device("cpu"), True)]
    assert len(rows) == 16
    for row in rows:
        assert row["way"].startswith("two GPUs") == ("error" in row), row
    assert sum(row.get("ulps", 99) < 8 for row in rows) == 8
    assert "float32 nf4 two GPUs, DDP: ValueError: Default process" in distributed.table(rows)


def test_time_that_kernels_share() -> None:
    computed = [(5e3, 8e3), (7e3, 12e3), (25e3, 40e3)]
    spans = {"nccl": [(0, 10e3), (20e3, 30e3)], "copies": [], "computed": computed}
    assert scaling.overlaps(spans) == {
        "nccl_ms": 20.0, "nccl_beside_others_ms": 10.0, "copies_ms": 0.0,
        "copies_beside_others_ms": 0.0,
    }  # fmt: skip
