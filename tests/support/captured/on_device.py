"""A step as a CUDA graph, and how long one takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.harness.timing import Replay
from prodial_kernels.training.step.graphed import CudaGraphs

Result = TypeVar("Result")


def captured(step: Callable[[], Result], warm_ups: int = 1) -> tuple[Callable[[], None], Result]:
    """Run a step as it is, then capture it; return its replay, and what that writes to."""
    graphs = CudaGraphs(torch.device("cuda"))
    results: list[Result] = []
    for _ in range(warm_ups):
        graphs.run(lambda: results.append(step()))
    results.clear()
    replay = graphs.capture(lambda: results.append(step()))
    (result,) = results
    return replay, result


def microseconds(function: Callable[[], None]) -> float:
    """Of one call as the device takes it, launched by a CUDA graph; the best of some."""
    function()
    replay = Replay([function], "cuda")
    return min(replay.sample() for _ in range(10))
