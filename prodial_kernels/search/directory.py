"""The directory of a search: what is in it, what search it is, and which processes work on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prodial_kernels.files.atomic import atomic_text
from prodial_kernels.files.locking import AlreadyLocked, locked
from prodial_kernels.search.config import SearchConfig
from prodial_kernels.training.run.versions import versions

FORMAT_VERSION = 1
_MAY_CHANGE = ("trials", "workers")
_MOST_WORKERS = 1024


class SearchError(RuntimeError):
    """A search cannot be started or continued, or has found nothing."""


class SearchDirectory:
    """Names of everything in a search's directory."""

    def __init__(self, path: str | Path) -> None:
        """Name the contents of ``path``; nothing is created."""
        self.path = Path(path).expanduser()
        self.identity_file = self.path / "search.json"
        self.database = self.path / "trials.sqlite"
        self.report_file = self.path / "report.md"
        self.results_file = self.path / "results.json"
        self.best_file = self.path / "best.json"
        self.plot_file = self.path / "search.png"
        self.workers = self.path / "workers"

    def check_startable(self) -> None:
        """Raise SearchError unless a new search may start here: in an empty directory or none."""
        if self.identity_file.exists():
            raise SearchError(
                f"{self.path} already holds a search: continue it with resume=True, or choose "
                "another directory with output=..."
            )
        if os.path.lexists(self.path) and (not self.path.is_dir() or any(self.path.iterdir())):
            raise SearchError(
                f"{self.path} exists and is not an empty directory; choose another with output=..."
            )

    def begin(self, config: SearchConfig) -> None:
        """Make the directory of a new search.

        Raises:
            SearchError: It holds something already.
            OSError: It cannot be made or written.
        """
        self.check_startable()
        self.workers.mkdir(parents=True, exist_ok=True)
        self.write(config)

    def write(self, config: SearchConfig) -> None:
        """Write down what search this is."""
        values = {
            "format_version": FORMAT_VERSION, "made_with": versions(), "config": config.to_dict()
        }  # fmt: skip
        atomic_text(self.identity_file, json.dumps(values, indent=2) + "\n")

    def read(self) -> SearchConfig:
        """Return the configuration of the search that is here; SearchError where there is none."""
        if not self.identity_file.is_file():
            raise SearchError(
                f"there is no search to resume in {self.path} (no {self.identity_file.name}); start"
                " one without resume=True, or name its directory with output=..."
            )
        try:
            values = json.loads(self.identity_file.read_text(encoding="utf-8"))
            if values["format_version"] != FORMAT_VERSION:
                found = values["format_version"]
                raise ValueError(f"format version {found}, expected {FORMAT_VERSION}")
            return SearchConfig.from_dict(values["config"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SearchError(
                f"{self.identity_file}: cannot be read: {type(error).__name__}: {error}; restore "
                "it, or start a new search in another directory with output=..."
            ) from error

    def check_same(self, saved: SearchConfig, config: SearchConfig) -> None:
        """Raise SearchError, which names what differs, unless it is the same search.

        More trials and another number of workers are.
        """
        ours, theirs = _flat(config), _flat(saved)
        differing = [
            f"{name} (search: {theirs.get(name)!r}, now: {ours.get(name)!r})"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name) and name not in (*_MAY_CHANGE, "output")
        ]
        if differing:
            raise SearchError(
                f"cannot resume the search in {self.path}, because these differ: "
                f"{', '.join(differing)}. Resume with the same settings, or start a new search in "
                "another directory with output=..."
            )

    @contextmanager
    def worker(self) -> Iterator[str]:
        """Hold the first free place of a worker; yield its name. The system frees it at the end."""
        for number in range(_MOST_WORKERS):
            place = self.workers / str(number)
            place.mkdir(parents=True, exist_ok=True)
            try:
                lock = locked(place)
                lock.__enter__()
            except AlreadyLocked:
                continue
            try:
                yield place.name
            finally:
                lock.__exit__(None, None, None)
            return
        raise SearchError(f"{_MOST_WORKERS} processes work in {self.path} already")

    def is_at_work(self, worker: str) -> bool:
        """Whether a process other than this one holds a worker's place."""
        place = self.workers / worker
        try:
            with locked(place):
                return False
        except AlreadyLocked:
            return True
        except FileNotFoundError:
            return False


def _flat(config: SearchConfig) -> dict[str, object]:
    values = config.to_dict()
    return {**values.pop("run"), **values}
