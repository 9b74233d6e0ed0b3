"""Other processes of a search: as many as were asked for, started by the first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType

from prodial_kernels.search.directory import SearchDirectory

_SECONDS_TO_STOP = 60.0


class OtherWorkers:
    """So many further workers of a search while the context is open; its end waits for them."""

    def __init__(self, folder: SearchDirectory, count: int, *, say: Callable[[str], None]) -> None:
        """Start none yet; ``say`` is told of those that failed."""
        self._folder = folder
        self._count = count
        self._say = say
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> OtherWorkers:
        """Start them; each writes what it has to say to a file in ``workers/``."""
        path = self._folder.path
        command = [
            sys.executable, "-m", "prodial_kernels", "search", "--resume", "--output",
            str(path), "--workers", "1",
        ]  # fmt: skip
        for number in range(1, self._count + 1):
            with open(self._folder.workers / f"log-{number}.txt", "ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        env=_environment(number, self._count + 1),
                    )
                )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for them; after an error or a signal, stop them."""
        try:
            for process in self._processes:
                if kind is not None:
                    process.terminate()
                process.wait(None if kind is None else _SECONDS_TO_STOP)
        finally:
            for process in self._processes:
                with suppress(OSError):
                    process.kill() if process.poll() is None else None
        failed = [n for n, p in enumerate(self._processes, start=1) if p.returncode]
        if failed and kind is None:
            logs = ", ".join(str(self._folder.workers / f"log-{n}.txt") for n in failed)
            self._say(f"{len(failed)} workers failed, their trials were run by others; see {logs}")


def _environment(number: int, processes: int) -> Mapping[str, str]:
    """Share out the GPUs, and the cores where nobody else has."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return environment
