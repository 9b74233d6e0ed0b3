"""A process that prepares and measures on request, over standard input and output.

Several prepare side by side; whoever asks sees to it that one at a time measures.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks.harness.memory import release  # noqa: E402
from benchmarks.harness.task import line_of, message_of  # noqa: E402


class Alone:
    """A lock among all workers of a user: entered by one of them at a time, freed when it ends."""

    def __init__(self) -> None:
        path = Path(tempfile.gettempdir()) / f"prodial-benchmarks-{os.getuid()}.lock"
        self._file = path.open("w")

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


class Server:
    """Holds what was prepared until it is measured."""

    def __init__(self, device: str) -> None:
        self.device, self.alone = device, Alone()
        self.prepared: dict[int, Any] = {}

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request.

        Raises:
            Exception: Whatever went wrong that is not one rival's own failure.
        """
        match request:
            case {"do": "prepare", "id": number, "task": task}:
                self.prepared.pop(number, None)
                self.prepared[number] = task.prepare(self.device, self.alone)
                return self._state()
            case {"do": "measure", "id": number}:
                return {"rows": self.prepared.pop(number).measure(), **self._state()}
            case {"do": "sample", "id": number}:
                return {"sample": self.prepared[number].sample()}
            case _:
                raise ValueError(f"do: got {request['do']!r}")

    def _state(self) -> dict[str, Any]:
        """Whether the device still takes work from this process."""
        try:
            release(self.device)
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
        except RuntimeError as error:
            return {"broken": str(error)[:200]}
        return {}


@contextmanager
def answers() -> Iterator[Any]:
    """Standard output, kept free of what libraries print."""
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        yield stream


def main() -> int:
    """Answer one line for each line, until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--load", nargs="*", default=(), help="modules to import beforehand")
    options = parser.parse_args()
    server = Server(options.device)
    with answers() as stream:
        for module in options.load:
            import_module(module)
        # A collection would otherwise look at all that torch's modules consist of, each time.
        gc.collect()
        gc.freeze()
        for line in sys.stdin:
            try:
                answer = server.respond(message_of(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            stream.write(line_of(answer))
            stream.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
