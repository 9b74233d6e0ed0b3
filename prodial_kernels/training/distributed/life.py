"""Whether another process of this machine is still there, as Linux tells it in ``/proc``."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple


class Life(NamedTuple):
    """A process, and no later one that is given its number.

    Attributes:
        host: The machine's name.
        pid: The process's number there.
        started: When it was started, in ticks since the machine was.
    """

    host: str
    pid: int
    started: int


def own_life() -> Life | None:
    """This process; None where there is no ``/proc``."""
    found = _state_of(os.getpid())
    return None if found is None else Life(socket.gethostname(), os.getpid(), found[1])


def is_alive(life: Life) -> bool:
    """Whether a process runs on this machine, seen from here; False for those of others.

    One that has ended and was not waited for yet does not.
    """
    if life.host != socket.gethostname():
        return False
    found = _state_of(life.pid)
    return found is not None and found[0] not in "ZX" and found[1] == life.started


def _state_of(pid: int) -> tuple[str, int] | None:
    try:
        # The name in front may hold anything, a parenthesis too.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
