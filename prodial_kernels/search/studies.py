"""The two studies of a search in optuna's storage: proposing trials, and what became of them.

All workers of a search share one SQLite file. A trial that is proposed belongs to the worker that
asked for it; where that one has ended, another worker proposes it again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prodial_kernels.search.directory import SearchDirectory
from prodial_kernels.search.record import ENDED, FAILED, Record
from prodial_kernels.upstream import require_extra

METHODS, SIZES = "methods", "sizes"
# Attributes of a trial in the storage.
_WORKER, _RECORD, _QUEUED, _KNOWN = "worker", "record", "queued", "known"
# A process that is killed between asking for a trial and signing it leaves it unsigned.
_SECONDS_TO_SIGN = 60
_LEAST_BEFORE_PRUNING = 4


def open_storage(file: Path) -> Any:
    """Open, or make, the storage of a search's trials.

    Raises:
        MissingExtraError: optuna is not installed.
    """
    require_extra("prodial search", ("optuna",), extra="search")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Workers wait for each other's writes.
    return optuna.storages.RDBStorage(
        f"sqlite:///{file.resolve()}", engine_kwargs={"connect_args": {"timeout": 120}}
    )


class Study:
    """One step of a search."""

    def __init__(
        self, storage: Any, step: str, folder: SearchDirectory, worker: str, *, seed: int
    ) -> None:
        """Open the study of a step, or make it.

        Args:
            storage: What :func:`open_storage` returned.
            step: Its name.
            folder: The search's directory.
            worker: This process's place in it.
            seed: What it proposes follows from this and from what was tried before.
        """
        import optuna

        self._optuna = optuna
        self._folder = folder
        self._worker = worker
        self._seed = seed
        self.step = step
        self._study = optuna.create_study(
            study_name=step, storage=storage, direction="minimize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_LEAST_BEFORE_PRUNING),
        )  # fmt: skip

    # --- Proposing. -----------------------------------------------------------------------------

    def queue(self, parameters: Mapping[str, Any]) -> None:
        """Let a trial with these parameters be proposed before any other."""
        given = dict(parameters)
        self._study.enqueue_trial(given, user_attrs={_QUEUED: given})

    def add(
        self,
        record: Record,
        parameters: Mapping[str, Any],
        proposed: Callable[[Any], object],
    ) -> None:
        """Add what another study has measured; ``proposed`` asks a trial for these parameters."""
        fixed = self._optuna.trial.FixedTrial(dict(parameters))
        proposed(fixed)
        made = self._optuna.trial.create_trial(
            params=fixed.params, distributions=fixed.distributions, value=record.value,
            user_attrs={_KNOWN: True},
        )  # fmt: skip
        self._study.add_trial(made)

    def ask(self) -> Any:
        """Return a trial of optuna to be given its parameters and run here."""
        digest = hashlib.sha256(f"{self._seed} {self.step} {self.count}".encode()).digest()
        # Of its own for every trial: what is proposed does not depend on where a search was
        # interrupted. What is tried first was queued, so nothing need be drawn blindly.
        self._study.sampler = self._optuna.samplers.TPESampler(
            n_startup_trials=0, seed=int.from_bytes(digest[:4], "big")
        )
        trial = self._study.ask()
        trial.set_user_attr(_WORKER, self._worker)
        return trial

    # --- What became of a trial. ----------------------------------------------------------------

    def reject(self, trial: Any, why: str) -> None:
        """End a trial that is not worth a run, so that its like is avoided."""
        trial.set_user_attr("rejected", why)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def repeat(self, trial: Any, record: Record) -> None:
        """End a trial that was run before, with what came out then."""
        trial.set_user_attr(_KNOWN, True)
        self._tell(trial, record)

    def finish(self, trial: Any, record: Record) -> None:
        """End a trial that was run."""
        trial.set_user_attr(_RECORD, record.to_dict())
        self._tell(trial, record)

    def abandon(self, trial: Any) -> None:
        """End a trial that was interrupted, and propose it again."""
        self._give_up(next(t for t in self._trials() if t.number == trial.number))

    def is_behind(self, trial: Any, step: int, value: float) -> bool:
        """Note a trial's evaluation after ``step`` steps; return whether most did better."""
        trial.report(value, step)
        return bool(trial.should_prune())

    def is_under_way(self, trial: Any) -> bool:
        """Whether a worker has begun a trial with the same parameters before."""
        return any(
            other.number < trial.number and other.params == trial.params
            for other in self._trials(self._optuna.trial.TrialState.RUNNING)
        )

    def reclaim(self) -> None:
        """Propose again what workers were at that have ended."""
        for trial in self._trials(self._optuna.trial.TrialState.RUNNING):
            worker = trial.user_attrs.get(_WORKER)
            if worker is None:
                asked = trial.datetime_start.timestamp()
                gone = time.time() - asked > _SECONDS_TO_SIGN
            else:
                # Between its trials a worker has none.
                gone = worker == self._worker or not self._folder.is_at_work(worker)
            if gone:
                self._give_up(trial)

    # --- What there is. -------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Trials that workers are at."""
        return len(self._trials(self._optuna.trial.TrialState.RUNNING))

    @property
    def queued(self) -> int:
        """Trials that are to be proposed before any other."""
        return len(self._trials(self._optuna.trial.TrialState.WAITING))

    @property
    def count(self) -> int:
        """Proposals so far, but for those that were interrupted."""
        return sum(not self._is_abandoned(trial) for trial in self._trials())

    @property
    def empty(self) -> bool:
        """Whether nothing was proposed or queued yet."""
        return not self._trials()

    def records(self) -> list[Record]:
        """Return the trials that were run, in their order, numbered from 1."""
        found = [t.user_attrs[_RECORD] for t in self._trials() if _RECORD in t.user_attrs]
        return [
            Record(**{**values, "on": tuple(values["on"]), "number": number})
            for number, values in enumerate(found, start=1)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What was noted for all workers."""
        return dict(self._study.user_attrs)

    def note(self, name: str, value: Any) -> None:
        """Note something for all workers."""
        self._study.set_user_attr(name, value)

    def _trials(self, *states: Any) -> Sequence[Any]:
        trials: Sequence[Any] = self._study.get_trials(deepcopy=False, states=states or None)
        return trials

    def _is_abandoned(self, trial: Any) -> bool:
        # One that failed was run, and has its record.
        failed = trial.state == self._optuna.trial.TrialState.FAIL
        return failed and not {_RECORD, _KNOWN} & trial.user_attrs.keys()

    def _give_up(self, trial: Any) -> None:
        fail = self._optuna.trial.TrialState.FAIL
        # What a queued trial was given is no parameter before it is asked for.
        parameters = {**trial.user_attrs.get(_QUEUED, {}), **trial.params}
        told = self._study.tell(trial.number, state=fail, skip_if_finished=True)
        if parameters and self._is_abandoned(told):
            self.queue(parameters)

    def _tell(self, trial: Any, record: Record) -> None:
        states = self._optuna.trial.TrialState
        if record.state == FAILED:
            self._study.tell(trial, state=states.FAIL)
        elif record.state == ENDED:
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, record.value)
