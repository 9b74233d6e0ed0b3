"""Who does the jobs: processes that prepare side by side, and measure one after the other.

A cold run is mostly compiling. So all that a busy device may do happens in as many processes as
there are cores, and what they hold ready is then measured while the others wait. Jobs come in
waves that fit the device's memory; the least important ones are dropped when the time is over.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Protocol

from benchmarks.harness.environment import ROOT
from benchmarks.harness.process import Worker, WorkerEnded, WorkerError
from benchmarks.harness.task import Task
from benchmarks.projector.measure import Row, failure
from benchmarks.projector.roofline import Ceilings, measure_ceilings

Report = Callable[[Task, list[Row]], None]
# A wave is at most so many jobs a process: longer waves are fuller, shorter ones report sooner.
JOBS_A_SEAT = 3
# One measurement takes seconds.
PATIENCE_S = 120.0


class Doing(Protocol):
    """What :class:`Crew` and :class:`InProcess` have in common."""

    ceilings: Ceilings | None

    def run(self, jobs: Sequence[Task], until: float, report: Report) -> list[Task]:
        """Do the jobs, reporting each one's rows at once; return those dropped.

        Args:
            jobs: The most important first.
            until: When to stop, on :func:`time.monotonic`'s clock.
            report: Called with each job that was measured, or failed.
        """


class InProcess:
    """Everything in this process, job by job."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.ceilings: Ceilings | None = None

    def run(self, jobs: Sequence[Task], until: float, report: Report) -> list[Task]:
        """As :meth:`Doing.run` says."""
        import torch

        for count, job in enumerate(jobs):
            if time.monotonic() > until:
                return list(jobs[count:])
            if self.ceilings is None:
                dtype = getattr(torch, job.dtype)
                self.ceilings = measure_ceilings(self.device, dtype, tiny=self.tiny)
            try:
                rows = job.prepare(self.device, nullcontext()).measure(self.ceilings)
            except Exception as error:
                rows = job.rows(failure(error))
            report(job, rows)
        return []


@dataclass
class Seat:
    """A worker's place: the worker may be replaced."""

    worker: Worker
    job: Task | None = None
    holds: list[Task] = field(default_factory=list)


class Crew:
    """Workers on one device.

    Args:
        count: How many.
        device: ``"cuda"`` or ``"cpu"``.
        memory: Bytes of the device that prepared jobs may hold together.
    """

    def __init__(self, count: int, device: str, memory: int) -> None:
        self.device, self.memory = device, memory
        self.seats = [Seat(Worker(ROOT, device)) for _ in range(count)]
        self.ceilings: Ceilings | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for seat in self.seats:
            # Nothing that it still does is wanted.
            seat.worker.kill()
        for seat in self.seats:
            seat.worker.close()

    def run(self, jobs: Sequence[Task], until: float, report: Report) -> list[Task]:
        """As :meth:`Doing.run` says."""
        waiting, dropped = deque(jobs), []
        while waiting:
            wave = self._wave(waiting)
            left_over = self._prepare(wave, until, report)
            seat_of = {job: seat for seat in self.seats for job in seat.holds}
            for job in wave:
                # What a worker held that ended meanwhile is nobody's fault: it is done again.
                if job in seat_of and job not in seat_of[job].holds:
                    waiting.appendleft(job)
                elif job in seat_of and time.monotonic() > until:
                    left_over.append(job)
                elif job in seat_of:
                    self._measure(seat_of[job], job, wave.index(job), report)
            for seat in self.seats:
                seat.holds = []
            dropped += left_over
            if time.monotonic() > until:
                return [*dropped, *waiting]
        return dropped

    def _wave(self, waiting: deque[Task]) -> list[Task]:
        """Take from the front what fits; at least one."""
        wave: list[Task] = []
        held = 0
        while waiting and len(wave) < JOBS_A_SEAT * len(self.seats):
            held += waiting[0].bytes
            if wave and held > self.memory:
                break
            wave.append(waiting.popleft())
        return wave

    def _prepare(self, wave: Sequence[Task], until: float, report: Report) -> list[Task]:
        """Have a wave prepared; report what failed, return what was not ready in time."""
        todo = deque(wave)
        while todo or any(seat.job for seat in self.seats):
            held = [job for seat in self.seats for job in seat.holds]
            left = until - sum(job.seconds for job in held) - time.monotonic()
            if left <= 0:
                break
            for seat in self.seats:
                if seat.job is None and todo:
                    seat.job = job = todo.popleft()
                    request = {"do": "prepare", "id": wave.index(job), "job": job.to_json()}
                    self._ask(seat, request)
            busy = [seat.worker for seat in self.seats if seat.job]
            answered = select.select(busy, [], [], min(left, 1.0))[0]
            for seat in self.seats:
                if seat.job and seat.worker in answered:
                    todo += self._prepared(seat, seat.job, report)
        late = list(todo)
        for seat in self.seats:
            if seat.job:
                # It would go on while the others are measured.
                late += [seat.job, *seat.holds]
                self._replace(seat)
        return late

    def _prepared(self, seat: Seat, job: Task, report: Report) -> list[Task]:
        """Take a worker's answer to the request to prepare; return what is to be done again."""
        seat.job = None
        try:
            answer = seat.worker.answer(PATIENCE_S)
            if "broken" in answer:
                raise WorkerEnded(answer["broken"])
        except WorkerEnded as error:
            report(job, job.rows(failure(error)))
            lost = seat.holds
            self._replace(seat)
            return lost
        except WorkerError as error:
            report(job, job.rows(failure(error)))
        else:
            seat.holds.append(job)
        return []

    def _measure(self, seat: Seat, job: Task, number: int, report: Report) -> None:
        """Ask for one job's rows, while every other worker waits."""
        try:
            if self.ceilings is None:
                self._ask(seat, {"do": "ceilings", "dtype": job.dtype})
                best = seat.worker.answer(PATIENCE_S)
                self.ceilings = Ceilings(best["flops"], best["bandwidth"])
            request = {"do": "measure", "id": number, "ceilings": asdict(self.ceilings)}
            self._ask(seat, request)
            answer = seat.worker.answer(PATIENCE_S)
        except WorkerError as error:
            report(job, job.rows(failure(error)))
            if isinstance(error, WorkerEnded):
                self._replace(seat)
        else:
            report(job, answer["rows"])
            if "broken" in answer:
                self._replace(seat)

    def _ask(self, seat: Seat, request: dict[str, Any]) -> None:
        """Ask; that a worker has ended is seen where its answer is awaited."""
        with suppress(WorkerEnded):
            seat.worker.ask(request)

    def _replace(self, seat: Seat) -> None:
        """Put a new process in the place of one that is of no more use."""
        seat.worker.kill()
        seat.worker.close()
        seat.worker, seat.job, seat.holds = Worker(ROOT, self.device), None, []
