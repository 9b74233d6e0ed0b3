"""The directory of a run: what is in it, whose it is, and when it may be written to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prodial_kernels.training.atomic import atomic_text
from prodial_kernels.training.config import FinetuneConfig

FORMAT_VERSION = 1
# How often a run is saved, where it is kept, how its steps are launched and what they keep for
# backward do not change what it computes.
NOT_COMPARED_ON_RESUME = frozenset(
    {
        "output",
        "save_every",
        "cuda_graph",
        "memory_budget",
        "activations",
        "gradient_checkpointing",
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
    """

    config: dict[str, Any]
    model: str
    data: str
    held_out: str
    device: str


class RunDirectory:
    """Names of everything in a run's directory."""

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

    def check_startable(self) -> None:
        """Raise unless a new run may start here.

        Raises:
            RunError: Something is there already.
        """
        if self.identity_file.exists():
            raise RunError(
                f"{self.path} already holds a run: continue it with --resume, or choose another "
                "directory with --output"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(
                f"{self.path} exists and is not an empty directory; choose another with --output"
            )

    @contextmanager
    def only_one_process(self) -> Iterator[None]:
        """Keep other processes from running in this directory; the system ends it with ours.

        Raises:
            RunError: Another process is running here.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"another process is running in {self.path}; wait for it") from error
            yield
        finally:
            os.close(descriptor)

    def read_identity(self) -> RunIdentity:
        """Read what run this is.

        Raises:
            RunError: There is no run, or its description cannot be read.
        """
        if not self.identity_file.exists():
            raise RunError(
                f"there is no run to resume in {self.path} (no run.json); start one without "
                "--resume, or name its directory with --output"
            )
        try:
            values = json.loads(self.identity_file.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
            return RunIdentity(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{self.identity_file}: cannot be read: {error}") from error

    def write_identity(self, identity: RunIdentity) -> None:
        """Describe a new run.

        Raises:
            OSError: The disk is full, or the place cannot be written.
        """
        values = {"format_version": FORMAT_VERSION, **asdict(identity)}
        atomic_text(self.identity_file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def check_same_config(folder: RunDirectory, saved: RunIdentity, config: FinetuneConfig) -> None:
    """Raise unless a resolved configuration computes what the saved run computes.

    Raises:
        RunError: Names every option that differs, with both values.
    """
    ours = _plain(config.to_dict())
    keys = _differing_keys(ours, saved.config)
    if keys:
        differing = [f"{k} (run: {saved.config.get(k)!r}, now: {ours.get(k)!r})" for k in keys]
        raise RunError(_refusal(folder, ", ".join(differing)))


def check_same_identity(folder: RunDirectory, saved: RunIdentity, now: RunIdentity) -> None:
    """Raise unless model, data and device are those of the saved run.

    Raises:
        RunError: Names what differs.
    """
    differing = [
        f"{what} (its contents have changed)"
        for what, ours, theirs in (
            ("model", now.model, saved.model),
            ("data", now.data, saved.data),
            ("held_out", now.held_out, saved.held_out),
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
        "the same settings, or start a new run in another directory with --output"
    )


def _differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the names under which two resolved configurations differ, sorted."""
    names = (ours.keys() | theirs.keys()) - NOT_COMPARED_ON_RESUME
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring values to what they are after a trip through JSON."""
    return dict(json.loads(json.dumps(values)))
