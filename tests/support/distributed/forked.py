"""Runs named functions in several processes each, as a launcher would start them.

``python -m support.distributed.forked MODULE FOLDER`` imports a module with ``CASES``, a dictionary
of functions that take a folder, and calls each in two forked processes that have a rank, one case
after the other. What a process returns or raises is in ``FOLDER/results.json``. Forks spare every
process the seconds that imports take; nothing is computed before them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 60.0


def main(module: str, folder: str) -> None:
    """Run every case of a module."""
    cases: Mapping[str, Callable[[Path], Any]] = import_module(module).CASES
    place = Path(folder)
    results = {name: run(case, name, place) for name, case in cases.items()}
    (place / "results.json").write_text(json.dumps(results))


def run(case: Callable[[Path], Any], name: str, place: Path, *, size: int = 2) -> list[Any]:
    """Return what each process came to: ``{"returned"}``, ``{"raised"}`` or ``{"ended"}``."""
    port = _free_port()
    children = [_fork(case, name, place, rank, size, port) for rank in range(size)]
    deadline = time.monotonic() + SECONDS
    results: list[Any] = []
    for rank, child in enumerate(children):
        file = place / f"{name}.{rank}.json"
        status = _wait(child, deadline)
        results.append(json.loads(file.read_text()) if file.exists() else {"ended": status})
    return results


def _fork(
    case: Callable[[Path], Any], name: str, place: Path, rank: int, size: int, port: int
) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    output = os.open(place / f"{name}.{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        outcome: dict[str, Any] = {"returned": case(place)}
    except BaseException as error:
        traceback.print_exc()
        outcome = {"raised": type(error).__name__, "message": str(error)}
    partial = place / f"{name}.{rank}.partial"
    partial.write_text(json.dumps(outcome))
    partial.rename(place / f"{name}.{rank}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _wait(child: int, deadline: float) -> str | int:
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return f"hung for {SECONDS:.0f} s"


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    main(*sys.argv[1:])
