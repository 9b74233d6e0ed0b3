"""The directory of a run: what is in it, whose it is, and when it may be written to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prodial_kernels.files.atomic import atomic_text, beside, left_beside
from prodial_kernels.files.locking import LOCK_FILE, AlreadyLocked, locked
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.run.versions import versions

FORMAT_VERSION = 1
# How often a run is saved, where it is kept and reported, which of its steps is written, how its
# steps are launched and what they keep for backward do not change what it computes.
NOT_COMPARED_ON_RESUME = frozenset(
    {
        "output",
        "save_every",
        "cuda_graph",
        "memory_budget",
        "experts",
        "activations",
        "gradient_checkpointing",
        "keep",
        "report_to",
        "shard",
    }
)


class RunError(RuntimeError):
    """A run directory cannot be started in, or not be continued with this configuration."""


@dataclass(frozen=True)
class RunIdentity:
    """What a run computes; two runs with equal identities compute the same.

    Attributes:
        config: The resolved configuration, as :meth:`FinetuneConfig.to_dict` gives it.
        model: Fingerprint of the pretrained model.
        data: Fingerprint of the training batches.
        held_out: Fingerprint of the held-out examples.
        device: ``"cpu"`` or ``"cuda"``.
        init_adapter: Fingerprint of the adapter that training begins with; empty without one.
    """

    config: dict[str, Any]
    model: str
    data: str
    held_out: str
    device: str
    init_adapter: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what the run computes; its states are marked with it."""
        values = asdict(self)
        values["config"] = {k: v for k, v in self.config.items() if k not in NOT_COMPARED_ON_RESUME}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class RunDirectory:
    """Names of everything in a run's directory, and who may write to it."""

    def __init__(self, path: str | Path) -> None:
        """Name the contents of ``path``; nothing is created."""
        self.path = Path(path).expanduser()
        self.identity_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.results_file = self.path / "results.json"
        self.plot_file = self.path / "loss.png"
        self.states = self.path / "state"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.full_model = self.path / "model"
        self.best = self.path / "best"
        self.tensorboard = self.path / "tensorboard"
        self._there: tuple[int, int] | None = None

    @property
    def own_names(self) -> frozenset[str]:
        """Names of everything that a run writes into its directory."""
        own = (
            self.identity_file, self.metrics_file, self.results_file, self.plot_file, self.states,
            self.adapter, self.merged, self.full_model, self.best, self.tensorboard,
        )  # fmt: skip
        return frozenset(path.name for path in own)

    @property
    def saved_nothing(self) -> bool:
        """Whether a run began here and ended before anything of it was saved."""
        results = (self.results_file, self.adapter, self.merged, self.full_model)
        kept = any(os.path.lexists(path) for path in results)
        return not kept and not (self.states.is_dir() and any(self.states.glob("step-*")))

    def check_startable(self) -> None:
        """Raise RunError unless a new run may start here.

        It may in an empty directory, and where an earlier run failed before it had saved anything.
        """
        if os.path.lexists(self.identity_file):
            if self.saved_nothing:
                # It may be anybody's: such a name is soon found.
                self.read_identity()
                return
            raise RunError(
                f"{self.path} already holds a run: continue it with resume=True, or choose "
                "another directory with output=..."
            )
        if os.path.lexists(self.path) and (not self.path.is_dir() or self._foreign()):
            raise RunError(
                f"{self.path} exists and is not an empty directory; choose another with output=..."
            )

    @contextmanager
    def only_one_process(self, *, create: bool = False) -> Iterator[None]:
        """Keep other processes from running in this directory; the system ends it with ours.

        Args:
            create: Make the directory if there is none, and take it away again if nothing has been
                written to it.

        Raises:
            RunError: Another process is running here.
            OSError: The directory cannot be made or written to.
        """
        made = self._make() if create else []
        try:
            try:
                with locked(self.path):
                    found = self.path.stat()
                    self._there = (found.st_dev, found.st_ino)
                    self._check_writable()
                    try:
                        yield
                    finally:
                        _remove_empty(made)
            except AlreadyLocked as error:
                raise RunError(str(error)) from error
        finally:
            # Again: where there is no better lock, a file was in it until now.
            _remove_empty(made)

    def check_there(self) -> None:
        """Raise RunError unless this still is the directory that `only_one_process` locked."""
        try:
            found = self.path.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._there:
            raise RunError(
                f"{self.path} was removed, moved or replaced while the run was writing to it; what "
                "was not saved elsewhere is lost"
            )

    def remove_leftovers(self) -> None:
        """Remove what a killed process left of its files here; call it under the lock."""
        for leftover in self._leftovers():
            leftover.unlink(missing_ok=True)

    def read_identity(self) -> RunIdentity:
        """Read what run this is; RunError where there is none, or it cannot be read."""
        if not self.identity_file.is_file():
            raise RunError(
                f"there is no run to resume in {self.path} (no run.json); start one without "
                "resume=True, or name its directory with output=..."
            )
        try:
            values = json.loads(self.identity_file.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            # For people to read.
            values.pop("made_with", None)
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
            identity = RunIdentity(**values)
            if not isinstance(identity.config, dict):
                raise TypeError("config must be an object")
            for name in ("model", "data", "held_out", "device", "init_adapter"):
                if not isinstance(getattr(identity, name), str):
                    raise TypeError(f"{name} must be a string")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{self.identity_file}: cannot be read: {type(error).__name__}: {error}; restore "
                "it, or start a new run in another directory with output=..."
            ) from error
        return identity

    def write_identity(self, identity: RunIdentity) -> None:
        """Describe a new run; call it under the lock."""
        values = {"format_version": FORMAT_VERSION, "made_with": versions(), **asdict(identity)}
        atomic_text(self.identity_file, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def _make(self) -> list[Path]:
        """Make the directory; return what was made, the innermost first."""
        missing = [p for p in (self.path, *self.path.parents) if not os.path.lexists(p)]
        self.path.mkdir(parents=True, exist_ok=True)
        return missing

    def _check_writable(self) -> None:
        probe = beside(self.identity_file, "partial")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()

    def _foreign(self) -> list[Path]:
        """What in the directory is no trace of a process of ours that was killed."""
        own = {*self._leftovers(), self.path / LOCK_FILE}
        return [path for path in self.path.iterdir() if path not in own]

    def _leftovers(self) -> list[Path]:
        files = (self.identity_file, self.metrics_file, self.results_file, self.plot_file)
        found = [path for file in files for path in left_beside(file, "partial")]
        # Earlier versions had one name for all temporary files.
        found += [file.with_name(f".{file.name}.partial") for file in files]
        return [path for path in found if path.is_file() or path.is_symlink()]


def run_around(path: Path) -> RunDirectory | None:
    """Return the run in whose directory a path lies, or None."""
    for parent in path.parents:
        folder = RunDirectory(parent)
        if folder.identity_file.is_file():
            try:
                folder.read_identity()
            except RunError:
                if not folder.states.is_dir():
                    continue
            return folder
    return None


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def check_same_config(folder: RunDirectory, saved: RunIdentity, config: FinetuneConfig) -> None:
    """Raise RunError unless a resolved configuration computes what the saved run computes.

    It names every option that differs, with both values.
    """
    ours = config.to_dict()
    # What the version that began the run did not know yet, it did as is the default now.
    theirs = FinetuneConfig().to_dict() | saved.config
    names = (ours.keys() | theirs.keys()) - NOT_COMPARED_ON_RESUME
    keys = sorted(name for name in names if ours.get(name) != theirs.get(name))
    if keys:
        differing = [f"{k} (run: {theirs.get(k)!r}, now: {ours.get(k)!r})" for k in keys]
        raise RunError(_refusal(folder, ", ".join(differing)))


def check_same_identity(folder: RunDirectory, saved: RunIdentity, now: RunIdentity) -> None:
    """Raise RunError, which says what differs, unless model, data and device are the saved."""
    differing = [
        f"{what} (its contents have changed)"
        for what, ours, theirs in (
            ("model", now.model, saved.model),
            ("data", now.data, saved.data),
            ("held_out", now.held_out, saved.held_out),
            ("init_adapter", now.init_adapter, saved.init_adapter),
        )
        if ours != theirs
    ]
    if now.device != saved.device:
        differing.append(f"device (run: {saved.device!r}, now: {now.device!r})")
    if differing:
        raise RunError(_refusal(folder, ", ".join(differing)))


def _refusal(folder: RunDirectory, differing: str) -> str:
    return (
        f"cannot resume the run in {folder.path}, because these differ: {differing}. Resume with "
        "the same settings, or start a new run in another directory with output=..."
    )
