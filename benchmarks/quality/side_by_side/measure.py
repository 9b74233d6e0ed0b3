"""How long do rows take at once? Steps of one stack in every way of computing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.bases.shapes import load_base
from benchmarks.quality.side_by_side.language import Language, language_of
from benchmarks.quality.side_by_side.mamba2 import shape_of
from benchmarks.quality.side_by_side.runner import PRODUCTS
from benchmarks.quality.side_by_side.stacked import weights_of
from benchmarks.quality.side_by_side.train import Member, Stack
from benchmarks.quality.side_by_side.weights import method_of
from benchmarks.quality.study.language import LanguageData
from benchmarks.quality.study.row import Spec
from benchmarks.quality.study.runner import Plan
from benchmarks.quality.study.train import data_of
from benchmarks.quality.tasks.task import load_task

__all__ = ["measure"]


def measure(
    plan: Plan,
    tasks: Path,
    *,
    device: torch.device,
    sizes: Sequence[int],
    ways: Sequence[str],
    seconds: float = float("inf"),
    profile: bool = False,
    say: Callable[..., None],
) -> list[dict[str, Any]]:
    """Train and score short stacks of one task's sweep.

    Args:
        plan: Whose first task, methods and recipe (of few steps).
        tasks: Folder of the tasks' files.
        device: Where to run.
        sizes: How many runs at once.
        ways: ``"tf32"``, ``"bfloat16"``, ``"float32"`` and each with ``" eager"`` behind it:
            without the kernels of ``fused.py``. The first is what losses are compared with.
        seconds: Nothing begins after that.
        profile: Say also which kernels take the time of a step.
        say: Is given the figures of each.

    Returns:
        Of each way and size: milliseconds a step, seconds a row of 250 steps (training alone) and
        of scoring its validation split, seconds until the first replay, GiB, the largest relative
        difference of a run's loss, over all steps, from the first way's of this size (of the worst
        and of the median run); or the error that a way ended with.
    """
    begun = time.monotonic()
    base = load_base(plan.base)
    shape = shape_of(base.model)
    weights = {name: tensor.to(device) for name, tensor in weights_of(base.model).items()}
    data = data_of(base, load_task(tasks, plan.tasks[0]), plan.recipe, device)
    assert isinstance(data, LanguageData)
    specs = [
        Spec(base.name, task, method.name, budget, rate, 0, plan.recipe)
        for task, method, budget in plan.cells()
        for rate in method.rates
    ]
    made = {(s.method, s.budget): None for s in specs}
    starts: dict[tuple[str, str], Any] = {key: method_of(base.model, *key, 0) for key in made}
    say(starts=len(starts), seconds=round(time.monotonic() - begun, 2))
    found: list[dict[str, Any]] = []
    for size in sizes:
        chosen = [specs[i % len(specs)] for i in range(size)]
        members = [
            Member(replace(s, seed=i // len(specs)), *starts[s.method, s.budget])
            for i, s in enumerate(chosen)
        ]
        task = language_of(
            shape, data, plan.recipe.limit, max(1, 131072 // size), splits=("validation",)
        )
        first: torch.Tensor | None = None
        for way in ways:
            if time.monotonic() - begun > seconds:
                return found
            figures: dict[str, Any] = {"way": way, "runs": size}
            try:
                stack, cost = _one(way, task, weights, members)
            except Exception as error:  # the next way may work
                figures["error"] = f"{error!r}"[:1000]
            else:
                if first is None:
                    first = stack.losses.double()
                differs = (stack.losses.double() / first - 1).abs().nan_to_num().amax(0)
                figures |= cost | {
                    "loss_differs": float(differs.max()), "median": float(differs.median()),
                }  # fmt: skip
                if profile and device.type == "cuda":
                    figures["kernels"] = _kernels(stack)
                del stack
            say(**figures)
            found.append(figures)
    return found


def _one(
    way: str,
    task: Language,
    weights: Mapping[str, torch.Tensor],
    members: Sequence[Member],
) -> tuple[Stack, dict[str, Any]]:
    """Train and score a stack in one way; return it with what it cost."""
    products, _, how = way.partition(" ")
    torch.backends.cuda.matmul.allow_tf32 = products == "tf32"
    gpu = task.device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    own = replace(task, dtype=PRODUCTS[products], fused=gpu and how != "eager")
    stack = Stack(own, weights, members)
    trained = stack.train()
    start = time.perf_counter()
    stack.accuracy("validation")
    scored, step = time.perf_counter() - start, trained.step_seconds
    return stack, {
        "ms_a_step": round(1e3 * step, 2),
        "row_of_250_steps": round(250 * step / len(members), 4),
        "row_scored": round(scored / len(members), 4),
        "until_first_replay": round(trained.seconds - step * stack.recipe.steps, 2),
        "gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if gpu else None,
    }


def _kernels(stack: Stack, count: int = 18) -> dict[str, float]:
    """Milliseconds of one step by kernel, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        stack.repeat_last_step()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    return {row.key[:70]: round(row.self_device_time_total / 1e3, 2) for row in rows[:count]}
