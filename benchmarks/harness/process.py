"""A worker process, as seen from the one that asks it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

from benchmarks.harness.environment import ROOT
from benchmarks.harness.task import Task, line_of, message_of


class WorkerError(Exception):
    """A worker answered that something went wrong."""


class WorkerEnded(WorkerError):
    """A worker ended or was ended, with all that it held."""


class Worker:
    """A process that prepares and measures tasks (:mod:`benchmarks.harness.worker`).

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        root: Folder whose ``prodial_kernels`` it measures; the suite is this tree's.
        load: Modules that it imports at once, before it is asked for anything.

    Raises:
        WorkerError: No package under ``root``.
    """

    def __init__(self, device: str, root: Path = ROOT, load: Sequence[str] = ()) -> None:
        if not (root / "prodial_kernels").is_dir():
            raise WorkerError(f"base: {root} has no folder prodial_kernels")
        self.root = root
        self._folder = tempfile.TemporaryDirectory(prefix="prodial-worker-")
        # The process runs in a folder where the package is theirs and the suite is ours.
        place = Path(self._folder.name)
        (place / "prodial_kernels").symlink_to((root / "prodial_kernels").resolve())
        (place / "benchmarks").symlink_to(ROOT / "benchmarks")
        self._log = (place / "log").open("w+")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        # Many of them share the processor's cores.
        environment.setdefault("OMP_NUM_THREADS", "1")
        # Kernels that libraries tune are tuned once per machine, not once per process. Not for the
        # process that asks: under MAMBA_DETERMINISTIC, mamba_ssm then tunes where it would not.
        environment.setdefault("TRITON_CACHE_AUTOTUNING", "1")
        command = [sys.executable, "-m", "benchmarks.harness.worker", "--device", device]
        self._process = subprocess.Popen(
            [*command, "--load", *load], cwd=place, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._in, self._out = cast(TextIO, self._process.stdin), cast(TextIO, self._process.stdout)

    def fileno(self) -> int:
        """For ``select``: readable when there is an answer, or when the process ended."""
        return self._out.fileno()

    def ask(self, do: str, number: int = 0, task: Task | None = None) -> None:
        """Send one request; the last one must have been answered.

        That the process has ended is seen where its answer is awaited.

        Args:
            do: ``"prepare"``, ``"measure"``, or ``"sample"`` of what has a method of that name.
            number: Of the task among those that the process holds.
            task: What to prepare.
        """
        with suppress(BrokenPipeError):
            self._in.write(line_of({"do": do, "id": number, "task": task}))
            self._in.flush()

    def answer(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for the answer to the last request.

        Raises:
            WorkerError: It could not do what was asked.
            WorkerEnded: It ended, or did not answer in time and was ended.
        """
        if timeout_s is not None and not select.select([self], [], [], max(0.0, timeout_s))[0]:
            self.kill()
            raise WorkerEnded(f"{self.root}: no answer within {timeout_s:.0f} s")
        line = self._out.readline()
        if not line:
            raise WorkerEnded(f"{self.root}: it ended: {self._tail()}")
        answer: dict[str, Any] = message_of(line)
        if "error" in answer:
            raise WorkerError(f"{self.root}: {answer['error']}")
        return answer

    def prepared(self, timeout_s: float | None = None) -> None:
        """Wait until what it was asked to prepare is ready.

        Raises:
            WorkerError, WorkerEnded: As :meth:`answer`; or the device takes no more work from it.
        """
        answer = self.answer(timeout_s)
        if "broken" in answer:
            raise WorkerEnded(answer["broken"])

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def close(self) -> None:
        """Let it end, which it does when its input does, and remove its folder."""
        with suppress(BrokenPipeError):
            self._in.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tail(self) -> str:
        """The end of what it wrote to standard error."""
        self._log.seek(0)
        return " ".join(self._log.read()[-600:].split())
