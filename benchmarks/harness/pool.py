"""Who does the tasks: processes that prepare side by side, and measure one after the other.

A cold run is mostly compiling. So all that a busy device may do happens in as many processes as
there are cores, and what they hold ready is then measured while the others wait. Tasks come in
waves that fit the device's memory; the least important ones are dropped when the time is over.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from benchmarks.harness.process import Worker, WorkerEnded, WorkerError
from benchmarks.harness.rows import status_of
from benchmarks.harness.task import Task

T = TypeVar("T", bound=Task)
# Called with each task that was measured, or failed, and its rows.
Report = Callable[[T, Sequence[Any]], None]
# A wave is at most so many tasks a process: longer waves are fuller, shorter ones report sooner.
TASKS_A_SEAT = 3
# One measurement takes seconds.
PATIENCE_S = 120.0


class InProcess(Generic[T]):
    """Everything in this process, task by task."""

    def __init__(self, device: str) -> None:
        self.device = device

    def run(self, tasks: Sequence[T], until: float, report: Report[T]) -> list[T]:
        """Do the tasks, reporting each one's rows at once; return those dropped.

        Args:
            tasks: The most important first.
            until: When to stop, on :func:`time.monotonic`'s clock.
            report: Called with each task that was measured, or failed.
        """
        for count, task in enumerate(tasks):
            if time.monotonic() > until:
                return list(tasks[count:])
            try:
                rows = task.prepare(self.device, nullcontext()).measure()
            except Exception as error:
                rows = task.rows(status_of(error))
            report(task, rows)
        return []


@dataclass
class Seat(Generic[T]):
    """A worker's place: the worker may be replaced."""

    worker: Worker
    task: T | None = None
    holds: list[T] = field(default_factory=list)


class WorkerPool(Generic[T]):
    """Workers on one device.

    Args:
        count: How many.
        device: ``"cuda"`` or ``"cpu"``.
        memory: Bytes of the device that prepared tasks may hold together.
        start: Starts a worker for a device.
    """

    def __init__(
        self, count: int, device: str, memory: int, start: Callable[[str], Worker] = Worker
    ) -> None:
        self.device, self.memory, self.start = device, memory, start
        self.seats: list[Seat[T]] = [Seat(start(device)) for _ in range(count)]

    def __enter__(self) -> WorkerPool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self.seats:
            # Nothing that it still does is wanted.
            seat.worker.kill()
        for seat in self.seats:
            seat.worker.close()

    def run(self, tasks: Sequence[T], until: float, report: Report[T]) -> list[T]:
        """As :meth:`InProcess.run` says."""
        waiting: deque[T] = deque(tasks)
        dropped: list[T] = []
        while waiting:
            wave = self.next_wave(waiting)
            left_over = self._prepare(wave, until, report)
            seat_of = {task: seat for seat in self.seats for task in seat.holds}
            for task in wave:
                # What a worker held that ended meanwhile is nobody's fault: it is done again.
                if task in seat_of and task not in seat_of[task].holds:
                    waiting.appendleft(task)
                elif task in seat_of and time.monotonic() > until:
                    left_over.append(task)
                elif task in seat_of:
                    self._measure(seat_of[task], task, wave.index(task), report)
            for seat in self.seats:
                seat.holds = []
            dropped += left_over
            if time.monotonic() > until:
                return [*dropped, *waiting]
        return dropped

    def next_wave(self, waiting: deque[T]) -> list[T]:
        """Take from the front what fits; at least one."""
        wave: list[T] = []
        held = 0
        while waiting and len(wave) < TASKS_A_SEAT * len(self.seats):
            held += waiting[0].bytes
            if wave and held > self.memory:
                break
            wave.append(waiting.popleft())
        return wave

    def _prepare(self, wave: Sequence[T], until: float, report: Report[T]) -> list[T]:
        """Have a wave prepared; report what failed, return what was not ready in time."""
        todo = deque(wave)
        while todo or any(seat.task for seat in self.seats):
            held = [task for seat in self.seats for task in seat.holds]
            left = until - sum(task.seconds for task in held) - time.monotonic()
            if left <= 0:
                break
            for seat in self.seats:
                if seat.task is None and todo:
                    seat.task = todo.popleft()
                    seat.worker.ask("prepare", wave.index(seat.task), seat.task)
            busy = [seat.worker for seat in self.seats if seat.task]
            answered = select.select(busy, [], [], min(left, 1.0))[0]
            for seat in self.seats:
                if seat.task and seat.worker in answered:
                    todo += self._prepared(seat, seat.task, report)
        late = list(todo)
        for seat in self.seats:
            if seat.task:
                # It would go on while the others are measured.
                late += [seat.task, *seat.holds]
                self._replace(seat)
        return late

    def _prepared(self, seat: Seat[T], task: T, report: Report[T]) -> list[T]:
        """Take a worker's answer to the request to prepare; return what is to be done again."""
        seat.task = None
        try:
            seat.worker.prepared(PATIENCE_S)
        except WorkerError as error:
            report(task, task.rows(status_of(error)))
            if isinstance(error, WorkerEnded):
                lost = seat.holds
                self._replace(seat)
                return lost
        else:
            seat.holds.append(task)
        return []

    def _measure(self, seat: Seat[T], task: T, number: int, report: Report[T]) -> None:
        """Ask for one task's rows, while every other worker waits."""
        try:
            seat.worker.ask("measure", number)
            answer = seat.worker.answer(PATIENCE_S)
        except WorkerError as error:
            report(task, task.rows(status_of(error)))
            if isinstance(error, WorkerEnded):
                self._replace(seat)
        else:
            report(task, answer["rows"])
            if "broken" in answer:
                self._replace(seat)

    def _replace(self, seat: Seat[T]) -> None:
        """Put a new process in the place of one that is of no more use."""
        seat.worker.kill()
        seat.worker.close()
        seat.worker, seat.task, seat.holds = self.start(self.device), None, []
