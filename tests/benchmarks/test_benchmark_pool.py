"""Workers prepare side by side; what fails is a row of its own, what is late is dropped."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest

from benchmarks.harness.pool import InProcess, WorkerPool
from benchmarks.harness.process import Worker, WorkerEnded, WorkerError
from benchmarks.harness.sources import ROOT, needed
from benchmarks.jobs import Job
from benchmarks.projector.cases import TINY, Case
from benchmarks.projector.measure import BARE
from benchmarks.projector.rows import ProjectorRow

PAIR = ("frozen", "prodial")
JOBS = [Job("table", replace(TINY[0], m=m), PAIR, replace(BARE, rounds=2)) for m in (8, 16, 24)]
FAR = 1e9


class Fakes:
    """Starts stand-ins for processes: they answer at once; ``fates`` says what happens to whom."""

    def __init__(self, fates: dict[tuple[str, int], str]) -> None:
        self.fates, self.made = fates, 0

    def __call__(self, device: str) -> Worker:
        self.made += 1
        return cast(Worker, Fake(self.fates))


class Fake:
    def __init__(self, fates: dict[tuple[str, int], str]) -> None:
        self._fates = fates
        self._reader, self._writer = os.pipe()
        os.write(self._writer, b"x")  # always readable
        self._sizes: dict[int, int] = {}
        self._asked = ("", 0)

    def fileno(self) -> int:
        return self._reader

    def ask(self, do: str, number: int = 0, task: Job | None = None) -> None:
        if task is not None:
            self._sizes[number] = task.case.m  # type: ignore[union-attr]
        self._asked = (do, self._sizes[number])

    def prepared(self, timeout_s: float | None = None) -> None:
        if "broken" in self.answer():
            raise WorkerEnded("illegal memory access")

    def answer(self, timeout_s: float | None = None) -> dict[str, Any]:
        m = self._asked[1]
        rows = {"rows": [ProjectorRow.of(replace(TINY[0], m=m), "prodial", "ok")]}
        match self._fates.pop(self._asked, ""):
            case "ends":
                raise WorkerEnded("it ended")
            case "fails":
                raise WorkerError("out of memory")
            case "breaks":
                return {"broken": "illegal memory access", **rows}
        return rows

    def kill(self) -> None: ...

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def run(start: Fakes, seats: int = 1) -> tuple[list[tuple[int, str]], list[Job]]:
    done: list[tuple[int, str]] = []
    with WorkerPool[Job](seats, "cpu", 1 << 40, start) as pool:
        dropped = pool.run(JOBS, FAR, lambda job, rows: done.append((rows[0].m, rows[0].status)))
    assert not start.fates
    return done, dropped


def test_jobs_are_measured_in_order() -> None:
    done, dropped = run(Fakes({}), seats=2)
    assert done == [(8, "ok"), (16, "ok"), (24, "ok")]
    assert dropped == []


@pytest.mark.parametrize("do", ["prepare", "measure"])
@pytest.mark.parametrize("fate", ["ends", "fails", "breaks"])
def test_what_happens_to_one_job_does_not_happen_to_others(do: str, fate: str) -> None:
    start = Fakes({(do, 16): fate})
    done, dropped = run(start)
    assert sorted(m for m, _ in done) == [8, 16, 24]
    assert dropped == []
    status = dict(done)[16]
    if (do, fate) == ("measure", "breaks"):
        assert status == "ok"  # it broke after it was measured
    else:
        assert status.startswith("failed: Worker")
    assert all(status == "ok" for m, status in done if m != 16)
    assert start.made == (1 if fate == "fails" else 2)


def test_workers_measure_and_say_what_went_wrong() -> None:
    done: dict[Job, list[ProjectorRow]] = {}
    bad = Job("table", replace(TINY[0], k=25, p=2), PAIR, BARE)
    start = partial(Worker, load=["benchmarks.jobs"])
    with WorkerPool[Job](1, "cpu", 1 << 30, start) as pool:
        until = time.monotonic() + 60
        dropped = pool.run([JOBS[0], bad], until, lambda job, rows: done.update({job: [*rows]}))
        assert dropped == []
        frozen, ours = done[JOBS[0]]
        assert frozen.ratio == 1
        assert ours.both_us is not None
        frozen, ours = done[bad]
        assert frozen.status == "ok"
        assert ours.status.startswith("failed: ")

        worker = pool.seats[0].worker
        worker.ask("nothing")
        with pytest.raises(WorkerError, match="do: got 'nothing'"):
            worker.answer(60)
        worker.ask("measure", 7)
        with pytest.raises(WorkerError, match="KeyError: 7"):
            worker.answer(60)
        worker.ask("prepare", task=JOBS[0])
        with pytest.raises(WorkerEnded, match="no answer within 0 s"):
            worker.answer(0)
        with pytest.raises(WorkerEnded, match="it ended"):
            worker.answer(60)


def test_when_the_time_is_over_the_rest_is_dropped() -> None:
    done: list[Job] = []
    over = time.monotonic() - 1
    assert InProcess[Job]("cpu").run(JOBS, over, lambda job, rows: done.append(job)) == JOBS
    with WorkerPool[Job](1, "cpu", 1 << 40, Fakes({})) as pool:
        assert pool.run(JOBS, over, lambda job, rows: done.append(job)) == JOBS
    assert done == []


def test_waves_fit_the_memory() -> None:
    small, large = (Job("table", Case(m, 2048, 8192), PAIR) for m in (2048, 65536))
    waiting = deque([small, large, small, *[small] * 9])
    with WorkerPool[Job](2, "cpu", 10 << 30, Fakes({})) as pool:
        assert pool.next_wave(waiting) == [small]
        assert pool.next_wave(waiting) == [large]
        assert pool.next_wave(waiting) == [small] * 6
    assert len(waiting) == 4


def test_the_harness_needs_no_subject() -> None:
    harness = ROOT / "benchmarks" / "harness"
    found = needed(sorted(harness.glob("*.py")))
    mine = {path for path in found if path.is_relative_to(ROOT / "benchmarks")}
    assert mine == {*harness.glob("*.py"), ROOT / "benchmarks" / "__init__.py"}
