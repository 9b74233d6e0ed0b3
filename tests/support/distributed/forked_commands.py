"""Runs of ``prodial`` in forks of one process, which spares each the seconds that imports take.

``python -m support.distributed.forked_commands`` reads a JSON object a line: ``{"run": [arguments],
"cwd", "stderr"}`` starts a command and answers with its process's number; ``{"wait": number}``
answers with what it ended by, as ``subprocess.Popen.returncode`` has it. Nothing is computed before
a fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from support.tiny_model import subprocess_environment


class Commands:
    """A process that starts commands; a context manager, at whose end all of them are killed."""

    def __init__(self) -> None:
        """Start it."""
        self._server = subprocess.Popen(
            [sys.executable, "-m", "support.distributed.forked_commands"],
            env=subprocess_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._running: set[int] = set()

    def start(self, *arguments: str, cwd: Path, stderr: Path | None = None) -> int:
        """Run ``prodial`` with these arguments; return the process's number."""
        given = {"run": arguments, "cwd": str(cwd), "stderr": str(stderr or os.devnull)}
        number: int = self._asked(given)
        self._running.add(number)
        return number

    def wait(self, number: int) -> int:
        """Return what a command ended by."""
        self._running.discard(number)
        code: int = self._asked({"wait": number})
        return code

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._running:
            os.kill(number, 9)
        self._server.communicate()

    def _asked(self, given: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(given), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


def _run(arguments: list[str], cwd: str, stderr: str) -> None:
    """Become a command."""
    from prodial_kernels.cli.commands import main

    code = 1
    try:
        os.chdir(cwd)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        for file, number in ((os.devnull, 1), (stderr, 2)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Answer until standard input ends."""
    import matplotlib.figure  # noqa: F401
    from transformers.models.mamba2 import modeling_mamba2  # noqa: F401

    import prodial_kernels.training.finetuning  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _run(asked["run"], asked["cwd"], asked["stderr"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
