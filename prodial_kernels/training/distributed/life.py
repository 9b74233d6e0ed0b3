"""Whether other processes of this machine are still there, as Linux tells it in ``/proc``."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
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


class Watch:
    """A thread that looks after other processes, whatever this one waits for meanwhile.

    Attributes:
        gone: The first one that was found to have ended, by its number; None while all are there.
    """

    def __init__(
        self, lives: Mapping[int, Life], call: Callable[[], object], *, every: float = 0.5
    ) -> None:
        """Look at ``lives``, and ``call`` once when one has ended; ``every`` so many seconds."""
        self.gone: int | None = None
        self._lives, self._call, self._every = lives, call, every
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        """Look no longer: from now on it is nothing special that one ends."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(self._every):
            gone = (number for number, life in self._lives.items() if not is_alive(life))
            self.gone = next(gone, None)
            if self.gone is not None:
                self._call()
                return


def _state_of(pid: int) -> tuple[str, int] | None:
    try:
        # The name in front may hold anything, a parenthesis too.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
