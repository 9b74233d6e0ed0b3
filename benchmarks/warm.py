"""Compile everything before anything is timed: in parallel processes, into the caches on disk.

A cold run is mostly torch.compile and Triton compiling one kernel after another; here each
(case, rival) pair gets a process of its own. The timed process then finds every kernel on disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.cases import Case
from benchmarks.environment import cpu_count

# Each process compiles in its own thread; fifteen that start fifteen more each would only swap.
# Kineto's level keeps the profiler's chatter from between the tables.
SETTINGS = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "KINETO_LOG_LEVEL": "5"}
# What one process takes of the device's memory: its context, and the operands of a large case.
MEMORY_OF_PROCESS = 4 << 30


def prepare_process() -> None:
    """Set what torch reads when it is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def compile_one(case: Case, name: str) -> None:
    """Run one step of one rival, which compiles all it needs."""
    from benchmarks.cases import draw
    from benchmarks.measure import start_afresh
    from benchmarks.rivals import select
    from benchmarks.rivals.layer import Step

    start_afresh()
    rival = next(rival for rival in select([name]) if rival.name == name)
    Step.on(draw(case, "cuda"), rival.prepare).both()


def compile_all(
    tasks: Iterable[tuple[Case, str]], processes: int | None = None
) -> tuple[float, list[str]]:
    """Compile every (case, rival name) and return the seconds it took and what failed.

    A failure costs only time: the timed process meets the same error in its own run.
    """
    start = time.perf_counter()
    tasks = list(dict.fromkeys(tasks))
    failures = []
    if not tasks:
        return 0.0, []
    room = torch.cuda.mem_get_info()[0] // MEMORY_OF_PROCESS
    workers = processes or max(1, min(len(tasks), cpu_count() - 1, room))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, case, name): (case, name) for case, name in tasks}
        for future, (case, name) in futures.items():
            if error := future.exception():
                failures.append(f"{name} on {case}: {type(error).__name__}: {error}")
    return time.perf_counter() - start, failures
