"""Several workers on one search: who takes which trial, and what becomes of abandoned ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.files.locking import locked
from prodial_kernels.search.config import SearchConfig
from prodial_kernels.search.directory import SearchDirectory
from prodial_kernels.search.parts import PARTS, Space
from prodial_kernels.search.studies import METHODS, Study, open_storage
from prodial_kernels.search.trials import Outcome
from prodial_kernels.search.work import Work
from prodial_kernels.training import FinetuneConfig
from prodial_kernels.training.run.progress import Progress

pytest.importorskip("optuna")
BASE = FinetuneConfig(steps=6)
SPACE = Space(BASE, tuple(PARTS[name] for name in ("scale", "diagonal", "lora")))


class Stub:
    """Runs no model: the value follows from the options."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.ran: list[FinetuneConfig] = []
        self._seconds = seconds

    def trainable(self, run: FinetuneConfig) -> int:
        return 10 + 10 * bool(run.train_scale) + 100 * (run.r or 0)

    def run(self, run: FinetuneConfig, ends: Callable[[int, Any], bool]) -> Outcome:
        self.ran.append(run)
        time.sleep(self._seconds)
        value = 2.0 - 0.1 * bool(run.train_scale) - 0.3 * bool(run.r) + abs((run.lr or 0) - 0.003)
        value += 1.0 * bool(run.train_diagonal)
        for step in (2, 4):
            if ends(step, {"bits_per_byte": value}):
                return Outcome({"bits_per_byte": value}, step, 0.1, True)
        return Outcome({"bits_per_byte": value}, 6, 0.1, False)


@pytest.fixture
def folder(tmp_path: Path) -> SearchDirectory:
    place = SearchDirectory(tmp_path / "search")
    place.begin(SearchConfig(run=BASE))
    return place


@contextmanager
def at_work(folder: SearchDirectory, stub: Stub, **options: Any) -> Iterator[Work]:
    storage = open_storage(folder.database)
    with folder.worker() as worker:
        yield Work(
            SearchConfig(run=BASE, **options), SPACE, stub, folder, storage,  # type: ignore[arg-type]
            worker=worker, display=Progress(enabled=False), tell=lambda: None,
        )  # fmt: skip
    storage.remove_session()


def test_workers_share_the_trials(folder: SearchDirectory) -> None:
    stubs = [Stub(0.02), Stub(0.02)]
    open_storage(folder.database).remove_session()
    records: list[Any] = []

    def work(stub: Stub) -> None:
        with at_work(folder, stub, trials=16) as mine:
            mine.run()
            records.append(mine.records)

    threads = [threading.Thread(target=work, args=(stub,)) for stub in stubs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(stub.ran) >= 3 for stub in stubs)
    assert len(records[0]) == len(records[1]) == sum(len(stub.ran) for stub in stubs) == 16
    assert records[0] == records[1]
    first = [r for r in records[0] if r.step == "methods"]
    # There are seven combinations of three parts, and step one ends with them.
    assert len(first) == len({r.on for r in first}) <= 7
    assert {r.on for r in first} >= {("scale",), ("diagonal",), ("lora",)}


def test_step_two_comes_closer(folder: SearchDirectory) -> None:
    with at_work(folder, Stub(), trials=30) as work:
        work.run()
        done = [r for r in work.records if r.state == "done"]
    best = min(done, key=lambda r: r.value)
    assert best.on == ("scale", "lora")
    assert best.value == pytest.approx(1.6, abs=0.003)


def test_what_falls_behind_is_ended_but_not_what_is_tried_by_itself(
    folder: SearchDirectory,
) -> None:
    with at_work(folder, Stub(), trials=11) as work:
        work.run()
        records = work.records
    ended = [r for r in records if r.state == "ended early"]
    assert ended
    assert all(r.steps < 6 for r in ended)
    assert all(len(r.on) > 1 for r in ended if r.step == "methods")
    assert [r.state for r in records if r.on == ("diagonal",)] == ["done"]


def test_what_a_worker_was_at_that_is_gone_is_tried_again(folder: SearchDirectory) -> None:
    with at_work(folder, Stub(), trials=8) as work:
        work.run()
        expected = [(r.on, r.values) for r in work.records]
    other = SearchDirectory(folder.path.parent / "other")
    other.begin(SearchConfig(run=BASE))
    # A worker that is killed in its second trial, of a name that nobody will have again.
    storage = open_storage(other.database)
    study = Study(storage, METHODS, other, "7", seed=0)
    with at_work(other, Stub(), trials=8) as work:
        work._queue_first()
    first = study.ask()
    on, values = work._proposed_methods(first)
    assert work._attempt(study, first, on, values)
    assert work._proposed_methods(study.ask())[0] == ("diagonal",)
    storage.remove_session()
    with at_work(other, Stub(), trials=8) as work:
        work.run()
        found = [(r.on, r.values) for r in work.records]
    assert sorted(map(str, found[:4])) == sorted(map(str, expected[:4]))
    assert len(found) == 8


def test_what_a_worker_is_at_is_left_to_it(folder: SearchDirectory) -> None:
    storage = open_storage(folder.database)
    (folder.workers / "7").mkdir()
    theirs = Study(storage, METHODS, folder, "7", seed=0)
    theirs.queue({"scale": True})
    trial = theirs.ask()
    mine = Study(storage, METHODS, folder, "0", seed=0)
    with locked(folder.workers / "7"):
        mine.reclaim()
        assert (mine.running, mine.queued) == (1, 0)
    mine.reclaim()
    assert (mine.running, mine.queued) == (0, 1)
    again = mine.ask()
    assert again.number != trial.number
    assert again.suggest_categorical("scale", [False, True])
    storage.remove_session()
