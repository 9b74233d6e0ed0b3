"""Names of processes, by which another process can tell whether one has ended."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
from contextlib import suppress

NAME_FORM = r"[0-9a-f]{8}-\d{1,10}"


def process_name() -> str:
    """Return the name of this process: its machine, hashed, and its number there."""
    return f"{_machine()}-{os.getpid()}"


def has_ended(name: str) -> bool:
    """Whether the process of that name has certainly ended; False for those of other machines."""
    machine, _, number = name.partition("-")
    if not re.fullmatch(NAME_FORM, name) or machine != _machine() or os.name != "posix":
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


@functools.cache
def _machine() -> str:
    parts = [socket.gethostname()]
    # Containers may share a name, but not the numbers of their processes.
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]
