"""The benchmark of several GPUs: what it says of rows, and the smallest of its measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import distributed
from benchmarks.training import processes
from prodial_kernels.training.distributed.world import ONE_PROCESS


def gradient(way: str, ulps: float) -> dict[str, Any]:
    return {
        "part": "gradients", "model": "mamba2", "dtype": "bfloat16", "base": "dense", "way": way,
        "ulps": ulps, "median_ulps": ulps / 2, "worst": "a", "equal": 0, "parameters": 16,
    }  # fmt: skip


def speed(processes: int, tokens: float) -> dict[str, Any]:
    return {
        "part": "scaling", "model": "mamba-1.4b", "processes": processes, "shard": False,
        "ms": 1.0, "tokens_per_second": tokens, "peak_gb": 1.0,
    }  # fmt: skip


def a_run(what: str, apart: float) -> dict[str, Any]:
    return {"part": "runs", "what": what, "farthest_loss": apart, "equal": not apart}


def test_what_is_as_it_must_be() -> None:
    rows = [
        gradient("one GPU, the same again", 40.0), gradient("two GPUs", 79.0),
        speed(1, 100.0), speed(2, 191.0),
        a_run("one GPU, again", 0.0), a_run("torchrun, two GPUs", 5e-5),
    ]  # fmt: skip
    distributed.add_ratios(rows)
    assert distributed.failed(rows) == []
    shown = distributed.table(rows)
    assert "1.91×" in shown
    assert "every figure equal" in shown


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([gradient("one GPU, the same again", 0.1), gradient("two GPUs", 5.0)], "two GPUs: 5 ulps"),
        ([gradient("one GPU, the same again", 0.1), gradient("two GPUs", float("nan"))], "nan"),
        ([speed(1, 100.0), speed(2, 189.0)], "mamba-1.4b: 1.89 times one GPU"),
        ([a_run("one GPU, again", 0.0), a_run("torchrun", 2e-4)], "torchrun: losses 0.0002 apart"),
        ([{"part": "scaling", "error": "processes ended with [1, 0]"}], "ended with [1, 0]"),
    ],
)
def test_what_is_not(rows: list[dict[str, Any]], said: str) -> None:
    distributed.add_ratios(rows)
    (message,) = distributed.failed(rows)
    assert said in message
    assert distributed.table(rows)


def test_it_needs_two_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.main([]) == 2
    assert "this needs 2 GPUs" in capsys.readouterr().err


def test_gradients_of_one_process() -> None:
    """The same again is the same; a batch at once is rounding away; a wrong one is far."""
    case = processes._Case(
        ONE_PROCESS, torch.device("cpu"), processes.TINY["mamba2"], torch.float32, None, 4, 16
    )
    case.step(case.halves)
    case.reference = case.taken()
    case.step(case.halves)
    assert case.compared() == {
        "ulps": 0.0, "median_ulps": 0.0, "worst": case.compared()["worst"], "equal": 16,
        "parameters": 16,
    }  # fmt: skip
    case.step(case.all)
    assert 0 < case.compared()["ulps"] < 4
    case.step(case.halves[:1])
    assert case.compared()["ulps"] > 1e5


def test_time_that_kernels_share() -> None:
    sent = processes._union([(0, 10), (20, 30)])
    computed = processes._union([(5, 8), (7, 12), (25, 40)])
    both = processes._union([*sent, *computed])
    assert (sent, computed) == ([(0, 10), (20, 30)], [(5, 12), (25, 40)])
    beside = sum(map(processes._length, (sent, computed))) - processes._length(both)
    assert beside == 10
