"""What one worker of a search does: both steps, trial by trial, together with the others."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from prodial_kernels.files.locking import locked
from prodial_kernels.search.config import SearchConfig
from prodial_kernels.search.directory import SearchDirectory, SearchError
from prodial_kernels.search.knobs import as_parameters
from prodial_kernels.search.parts import Space, label
from prodial_kernels.search.record import DONE, ENDED, FAILED, Record, ranked
from prodial_kernels.search.studies import METHODS, SIZES, Study
from prodial_kernels.search.trials import Trials, objective
from prodial_kernels.training.run.progress import Progress

Proposal: TypeAlias = tuple[tuple[str, ...], dict[str, Any]]
"""A combination, and the values of its knobs."""

# Proposals in a row that are known or too large, after which one is drawn that is not known, and
# after which there is taken to be nothing else.
_IDLE_TO_DRAW = 2
_MOST_IDLE = 25
_DRAWS = 100
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_FOR_A_TURN = 600.0
_FAILURES_TO_GIVE_UP = 3
_COMBINATION = "combination"


class Work:
    """One worker's part of a search."""

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        trials: Trials,
        folder: SearchDirectory,
        storage: Any,
        *,
        worker: str,
        display: Progress,
        tell: Callable[[], None],
    ) -> None:
        """Take part in a search.

        Args:
            config: Its options.
            space: What it chooses from.
            trials: Runs trials in this process.
            folder: Its directory.
            storage: Its storage.
            worker: This process's place in it.
            display: Where each trial is told.
            tell: Called after each trial.
        """
        self._config = config
        self._space = space
        self._trials = trials
        self._folder = folder
        self._display = display
        self._tell = tell
        seed = config.run.seed
        self.first = Study(storage, METHODS, folder, worker, seed=seed)
        self.second = Study(storage, SIZES, folder, worker, seed=seed)

    @property
    def records(self) -> list[Record]:
        """Every trial of the search that was run, in order, numbered."""
        return all_records(self.first, self.second)

    def run(self) -> None:
        """Run trials until there are as many as were asked for.

        Raises:
            SearchError: No trial comes to its end.
            Interrupted: A signal arrived; the trial that was under way is proposed again.
        """
        singles = len(self._space.parts)
        if _CHOSEN not in self.second.settings:
            with self._turn():
                if self.first.empty:
                    self._queue_first()
            rest = self._config.trials - singles
            self._run_until(self.first, singles + (rest + 1) // 2, self._proposed_methods)
        labels = self._chosen()
        left = self._config.trials - len(self.first.records())
        self._run_until(self.second, left, lambda trial: self._proposed_sizes(trial, labels))

    # --- Step one. ------------------------------------------------------------------------------

    def _queue_first(self) -> None:
        """Let every part be tried by itself, then all of them together."""
        names = [part.name for part in self._space.parts]
        for name in names:
            self.first.queue({other: other == name for other in names})
        self.first.queue(dict.fromkeys(names, True))

    def _proposed_methods(self, trial: Any) -> Proposal:
        names = [part.name for part in self._space.parts]
        on = tuple(name for name in names if trial.suggest_categorical(name, [False, True]))
        return on, self._space.defaults(on)

    # --- Step two. ------------------------------------------------------------------------------

    def _chosen(self) -> dict[str, tuple[str, ...]]:
        """Return the combinations whose sizes are searched, by their labels."""
        with self._turn():
            if _CHOSEN not in self.second.settings:
                best = ranked(self.first.records())[: self._config.refine]
                if not best:
                    raise SearchError(_nothing_done(self.first.records()))
                labels = {label(record.on): record.on for record in best}
                for record in best:
                    parameters = self._space.knobs(record.on)
                    given = {_COMBINATION: label(record.on)}
                    given |= as_parameters(parameters, record.values)
                    self.second.add(record, given, lambda t: self._proposed_sizes(t, labels))
                self.second.note(_CHOSEN, {name: list(on) for name, on in labels.items()})
            chosen = self.second.settings[_CHOSEN]
        return {name: tuple(on) for name, on in chosen.items()}

    def _proposed_sizes(self, trial: Any, labels: Mapping[str, tuple[str, ...]]) -> Proposal:
        on = labels[trial.suggest_categorical(_COMBINATION, list(labels))]
        knobs = self._space.knobs(on)
        return on, {name: knob.suggest(trial, name) for name, knob in knobs.items()}

    # --- Trials. --------------------------------------------------------------------------------

    def _run_until(self, study: Study, planned: int, proposed: Callable[[Any], Proposal]) -> None:
        """Run trials of a study until so many were run, and no other worker is at one."""
        idle, exhausted = 0, False
        while True:
            with self._turn():
                study.reclaim()
                running = study.running
                due = len(study.records()) + running < planned and not exhausted
                if due and study is self.first and not study.queued:
                    exhausted = idle >= _IDLE_TO_DRAW and not self._queue_unknown()
                trial = study.ask() if due and not exhausted else None
            if trial is None:
                if not running:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                continue
            try:
                idle = 0 if self._attempt(study, trial, *proposed(trial)) else idle + 1
            except BaseException:
                study.abandon(trial)
                raise
            exhausted = exhausted or idle >= _MOST_IDLE
        if exhausted:
            self._display.say(
                f"step {study.step!r} ends early: what else was proposed is known already, or has "
                "too many parameters"
            )

    def _queue_unknown(self) -> bool:
        """Queue a combination that was not tried yet; return whether one was found."""
        names = [part.name for part in self._space.parts]
        known = {record.on for record in self.first.records()}
        draw = random.Random(f"{self._config.run.seed} {self.first.count}")
        for _ in range(_DRAWS):
            chosen = {name: draw.random() < 0.5 for name in names}
            on = tuple(name for name in names if chosen[name])
            if on and on not in known:
                self.first.queue(chosen)
                return True
        return False

    def _attempt(
        self, study: Study, trial: Any, on: tuple[str, ...], values: dict[str, Any]
    ) -> bool:
        """Run a trial, unless it is not worth it; return whether it was run."""
        if not on:
            study.reject(trial, "nothing is switched on")
            return False
        for record in self.records:
            if _same(record, on, values):
                study.repeat(trial, record)
                return False
        if study.is_under_way(trial):
            study.reject(trial, "another worker is at it")
            return False
        measured = self._measured(study, trial, on, values)
        if measured is None:
            return False
        study.finish(trial, measured)
        records = self.records
        self._display.say(_line(len(records), self._config.trials, measured))
        if len(records) >= _FAILURES_TO_GIVE_UP and all(r.state == FAILED for r in records):
            raise SearchError(_nothing_done(records))
        self._tell()
        return True

    def _measured(
        self, study: Study, trial: Any, on: tuple[str, ...], values: dict[str, Any]
    ) -> Record | None:
        """Return what a trial came to; None where it cannot be, or has too many parameters."""
        # Step one needs what every part does by itself.
        may_end = len(on) > 1 or study is not self.first

        def ends(step: int, metrics: Mapping[str, Any]) -> bool:
            behind = study.is_behind(trial, step, objective(metrics))
            return behind and may_end

        trainable = 0
        made: dict[str, Any] = {"number": 0, "step": study.step, "on": on, "values": values}
        try:
            made["options"] = self._space.options(on, values)
            config = self._space.run(on, values)
            try:
                trainable = self._trials.trainable(config)
            except ValueError as error:
                # Such as two that train the same tensor.
                study.reject(trial, str(error))
                return None
            most = self._config.max_trainable
            if most is not None and trainable > most:
                study.reject(trial, f"{trainable:,} trained parameters")
                return None
            outcome = self._trials.run(config, ends)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            made.setdefault("options", {})
            return Record(**made, state=FAILED, trainable=trainable, error=said)
        value = objective(outcome.metrics)
        if value == float("inf"):
            return Record(
                **made, state=FAILED, trainable=trainable, error="the evaluation is not finite"
            )
        return Record(
            **made, state=ENDED if outcome.ended else DONE, value=value, metrics=outcome.metrics,
            trainable=trainable, steps=outcome.step, seconds=round(outcome.seconds, 2),
        )  # fmt: skip

    def _turn(self) -> Any:
        """One worker at a time."""
        return locked(self._folder.path, wait=_SECONDS_FOR_A_TURN)


_CHOSEN = "chosen"


def all_records(*studies: Study) -> list[Record]:
    """Return the trials of several studies that were run, numbered in one row."""
    found = [record for study in studies for record in study.records()]
    return [record.numbered(number) for number, record in enumerate(found, start=1)]


def _same(record: Record, on: Sequence[str], values: Mapping[str, Any]) -> bool:
    def text(some: Mapping[str, Any]) -> str:
        return json.dumps(dict(some), sort_keys=True)

    return record.on == tuple(on) and text(record.values) == text(values)


def _line(number: int, trials: int, record: Record) -> str:
    start = f"trial {number} of {trials}, {record.step}: {label(record.on)}: "
    if record.state == FAILED:
        return f"{start}failed: {' '.join(record.error.split())[:300]}"
    end = f", ended after step {record.steps}" if record.state == ENDED else ""
    return f"{start}{record.value:.4f}, {record.trainable:,} trained, {record.seconds:.0f} s{end}"


def _nothing_done(records: Sequence[Record]) -> str:
    failed = [record for record in records if record.state == FAILED]
    if not failed:
        return "no trial came to its end"
    return f"all {len(failed)} trials failed; the first, {label(failed[0].on)}: {failed[0].error}"
