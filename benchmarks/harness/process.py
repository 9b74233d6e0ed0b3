"""A worker as seen from the process that asks it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from benchmarks.harness.environment import ROOT


class WorkerError(Exception):
    """A worker answered that something went wrong."""


class WorkerEnded(WorkerError):
    """A worker ended or was ended, with all that it held."""


class Worker:
    """A process that measures with the ``prodial_kernels`` under ``root``.

    Args:
        root: Folder that holds a ``prodial_kernels``; the suite is this tree's.
        device: ``"cuda"`` or ``"cpu"``.

    Raises:
        WorkerError: No package under ``root``.
    """

    def __init__(self, root: Path, device: str) -> None:
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker", "--device", device],
            cwd=place, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def fileno(self) -> int:
        """For ``select``: readable when there is an answer, or when the process ended."""
        return self._out.fileno()

    def ask(self, message: dict[str, Any]) -> None:
        """Send one request; the last one must have been answered.

        Raises:
            WorkerEnded: It is not there to ask.
        """
        try:
            self._in.write(json.dumps(message) + "\n")
            self._in.flush()
        except BrokenPipeError:
            raise WorkerEnded(f"{self.root}: it ended: {self._tail()}") from None

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
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.root}: {answer['error']}")
        return answer

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _in(self) -> TextIO:
        return _pipe(self._process.stdin)

    @property
    def _out(self) -> TextIO:
        return _pipe(self._process.stdout)

    def _tail(self) -> str:
        """The end of what it wrote to standard error."""
        self._log.seek(0)
        return " ".join(self._log.read()[-600:].split())


def _pipe(pipe: Any) -> TextIO:
    """The pipe, which is None only if the process was made without one."""
    if pipe is None:
        raise WorkerError("the worker has no pipe")
    stream: TextIO = pipe
    return stream
