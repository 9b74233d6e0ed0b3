"""A process that prepares and measures on request, over standard input and output.

Several prepare side by side; whoever asks sees to it that one at a time measures.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks.harness.task import Prepared, Task  # noqa: E402
from benchmarks.jobs import Job  # noqa: E402
from benchmarks.models.backbones import ModelJob, TuneJob  # noqa: E402
from benchmarks.projector.measure import PreparedCase, release  # noqa: E402
from benchmarks.projector.roofline import Ceilings, measure_ceilings  # noqa: E402


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
        self.prepared: dict[int, Prepared] = {}

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request.

        Raises:
            Exception: Whatever went wrong that is not one rival's own failure.
        """
        match request["do"]:
            case "prepare":
                job = task_of(request["job"])
                self.prepared.pop(request["id"], None)
                self.prepared[request["id"]] = job.prepare(self.device, self.alone)
                return self._state()
            case "measure":
                rows = self.prepared.pop(request["id"]).measure(Ceilings(**request["ceilings"]))
                return {"rows": rows, **self._state()}
            case "sample":
                prepared = self.prepared[request["id"]]
                if not isinstance(prepared, PreparedCase):
                    raise TypeError("sample: expected a projector's job")
                return {"us": prepared.sample(), "rows": list(prepared.rows.values())}
            case "ceilings":
                dtype = getattr(torch, request["dtype"])
                ceilings = measure_ceilings(self.device, dtype, tiny=self.device == "cpu")
                return {**asdict(ceilings), **self._state()}
            case other:
                raise ValueError(f"do: got {other!r}")

    def _state(self) -> dict[str, Any]:
        """Whether the device still takes work from this process."""
        try:
            release(self.device)
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
        except RuntimeError as error:
            return {"broken": str(error)[:200]}
        return {}


def task_of(data: dict[str, Any]) -> Task:
    """Read what was asked for."""
    match data["part"]:
        case "model":
            return ModelJob.from_json(data)
        case "tune":
            return TuneJob.from_json(data)
        case _:
            return Job.from_json(data)


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
    server = Server(parser.parse_args().device)
    # A collection would otherwise look at all that torch's modules consist of, each time.
    gc.collect()
    gc.freeze()
    with answers() as stream:
        for line in sys.stdin:
            try:
                answer = server.respond(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
