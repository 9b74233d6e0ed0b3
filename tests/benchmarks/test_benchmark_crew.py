"""Workers prepare side by side; what fails is a row of its own, what is late is dropped."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from benchmarks.harness import crew as crew_module
from benchmarks.harness.crew import Crew, InProcess
from benchmarks.harness.environment import ROOT
from benchmarks.harness.process import Worker, WorkerEnded, WorkerError
from benchmarks.jobs import Job
from benchmarks.projector.cases import TINY, Case
from benchmarks.projector.measure import BARE, Row

PAIR = ("frozen", "prodial")
JOBS = [Job("table", replace(TINY[0], m=m), PAIR, replace(BARE, rounds=2)) for m in (8, 16, 24)]
FAR = 1e9


class Fake:
    """Stands in for a process: answers at once; ``fates`` says to whom something happens."""

    fates: ClassVar[dict[tuple[str, int], str]] = {}
    made = 0

    def __init__(self, root: object, device: str) -> None:
        Fake.made += 1
        self._reader, self._writer = os.pipe()
        os.write(self._writer, b"x")  # always readable
        self.ids: dict[int, int] = {}
        self.request: dict[str, Any] = {}

    def fileno(self) -> int:
        return self._reader

    def ask(self, request: dict[str, Any]) -> None:
        self.request = request

    def answer(self, timeout_s: float | None = None) -> dict[str, Any]:
        request = self.request
        if request["do"] == "ceilings":
            return {"flops": 1.0, "bandwidth": 1.0}
        if request["do"] == "prepare":
            self.ids[request["id"]] = request["job"]["case"]["m"]
        m = self.ids[request["id"]]
        fate = Fake.fates.pop((request["do"], m), "")
        if fate == "ends":
            raise WorkerEnded("it ended")
        if fate == "fails":
            raise WorkerError("out of memory")
        if fate == "breaks":
            return {"broken": "illegal memory access", "rows": [{"status": "ok", "m": m}]}
        return {"rows": [{"status": "ok", "m": m}]}

    def kill(self) -> None: ...

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def run(
    monkeypatch: pytest.MonkeyPatch, fates: dict[tuple[str, int], str], seats: int = 1
) -> tuple[list[tuple[int, str]], list[Job]]:
    monkeypatch.setattr(crew_module, "Worker", Fake)
    Fake.fates, Fake.made = dict(fates), 0
    done: list[tuple[int, str]] = []
    with Crew(seats, "cpu", 1 << 40) as crew:
        dropped = crew.run(
            JOBS, FAR, lambda job, rows: done.append((job.case.m, rows[0]["status"]))
        )
    assert not Fake.fates
    return done, dropped


def test_jobs_are_measured_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done, dropped = run(monkeypatch, {}, seats=2)
    assert done == [(8, "ok"), (16, "ok"), (24, "ok")]
    assert dropped == []


@pytest.mark.parametrize("do", ["prepare", "measure"])
@pytest.mark.parametrize("fate", ["ends", "fails", "breaks"])
def test_what_happens_to_one_job_does_not_happen_to_others(
    do: str, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, dropped = run(monkeypatch, {(do, 16): fate})
    assert sorted(m for m, _ in done) == [8, 16, 24]
    assert dropped == []
    status = dict(done)[16]
    if (do, fate) == ("measure", "breaks"):
        assert status == "ok"  # it broke after it was measured
    else:
        assert status.startswith("failed: Worker")
    assert all(status == "ok" for m, status in done if m != 16)
    assert Fake.made == (1 if fate == "fails" else 2)


def test_workers_measure(capsys: pytest.CaptureFixture[str]) -> None:
    done: dict[Job, list[Row]] = {}
    bad = Job("table", replace(TINY[0], k=25, p=2), PAIR, BARE)
    with Crew(1, "cpu", 1 << 30) as crew:
        dropped = crew.run(
            [JOBS[0], bad], time.monotonic() + 60, lambda job, rows: done.update({job: rows})
        )
    assert dropped == []
    frozen, ours = done[JOBS[0]]
    assert frozen["ratio"] == 1
    assert ours["both_us"] > 0
    frozen, ours = done[bad]
    assert frozen["status"] == "ok"
    assert ours["status"].startswith("failed: ")


def test_when_the_time_is_over_the_rest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Job] = []
    over = time.monotonic() - 1
    alone = InProcess("cpu", tiny=True)
    assert alone.run(JOBS, over, lambda job, rows: done.append(job)) == JOBS
    monkeypatch.setattr(crew_module, "Worker", Fake)
    with Crew(1, "cpu", 1 << 40) as crew:
        assert crew.run(JOBS, over, lambda job, rows: done.append(job)) == JOBS
    assert done == []


def test_waves_fit_the_memory() -> None:
    crew = object.__new__(Crew)
    crew.seats, crew.memory = [None] * 2, 10 << 30  # type: ignore[list-item]
    small, large = (Job("table", Case(m, 2048, 8192), PAIR) for m in (2048, 65536))
    waiting = deque([small, large, small, *[small] * 9])
    assert crew._wave(waiting) == [small]
    assert crew._wave(waiting) == [large]
    assert crew._wave(waiting) == [small] * 6
    assert len(waiting) == 4


def test_a_worker_says_what_went_wrong() -> None:
    with Worker(ROOT, "cpu") as worker:
        worker.ask({"do": "nothing"})
        with pytest.raises(WorkerError, match="do: got 'nothing'"):
            worker.answer(60)
        worker.ask({"do": "measure", "id": 7, "ceilings": {"flops": 1.0, "bandwidth": 1.0}})
        with pytest.raises(WorkerError, match="KeyError: 7"):
            worker.answer(60)
        worker.ask({"do": "prepare", "id": 0, "job": JOBS[0].to_json()})
        with pytest.raises(WorkerEnded, match="no answer within 0 s"):
            worker.answer(0)
        with pytest.raises(WorkerEnded, match="it ended"):
            worker.answer(60)
