"""One projector through pytest-benchmark, for its own comparisons between saved runs.

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:5%

A round is one replay over all operand sets; ``extra_info`` holds the figures of one step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness.environment import cache_bytes
from benchmarks.harness.memory import release
from benchmarks.harness.timing import Replay, synchronise
from benchmarks.projector.cases import TABLE_SHAPES, TINY, Case, draw, rotating_sets
from benchmarks.projector.checks import CorrectnessCheck
from benchmarks.projector.rivals import Rival, select
from benchmarks.projector.rivals.layer import Step

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES = TABLE_SHAPES if CUDA else (*TINY, replace(TINY[0], p=12))


@pytest.mark.parametrize("rival", select(strong=True), ids=lambda rival: rival.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(benchmark: Any, case: Case, rival: Rival) -> None:
    """Check the rival, then time replays of its step."""
    release(DEVICE)
    errors = CorrectnessCheck(case, DEVICE).errors_of(rival)
    sets = range(rotating_sets(case, cache_bytes(DEVICE)))
    steps = [Step.on(draw(case, DEVICE, seed), rival.prepare).both for seed in sets]
    for step in steps:
        step()
    replay = Replay(steps, DEVICE)

    def once() -> None:
        replay.run()
        synchronise(CUDA)

    benchmark.group = str(case)
    benchmark.extra_info |= {
        "steps_per_round": len(replay.steps), "output_error": errors.output,
        "gradient_error": errors.gradient,
    }  # fmt: skip
    benchmark.pedantic(once, rounds=30 if CUDA else 3, warmup_rounds=3 if CUDA else 1)
