"""Reading a file that a user names, in bounded time.

Regular files are read whole. A pipe (``<(command)``, ``/dev/stdin``) is read until it ends, unless
it stays silent too long or exceeds a size. A device is not read at all.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from pathlib import Path

SILENT_PIPE_SECONDS = 10.0
"""How long a pipe may say nothing before it is given up."""


def read_bytes(path: Path, *, most_of_a_pipe: int) -> bytes:
    """Read a file whole, or a pipe until it ends.

    Args:
        path: What to read.
        most_of_a_pipe: Bytes after which a pipe is given up.

    Raises:
        OSError: Missing, not readable, a directory, a device, or a pipe that stays silent or goes
            on for ever; ``strerror`` says which.
    """
    # A pipe that nobody writes to would not even open without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return file.readall()
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return _read_pipe(path, descriptor, most_of_a_pipe)
    kind = "a directory" if stat.S_ISDIR(mode) else "a device, which need not end"
    raise OSError(errno.EINVAL, f"it is {kind}; give a file", str(path))


def _read_pipe(path: Path, descriptor: int, most: int) -> bytes:
    print(f"reading {path}, a pipe, until it ends", file=sys.stderr)
    parts: list[bytes] = []
    size = 0
    while True:
        if not _wait(descriptor):
            raise OSError(
                errno.ETIMEDOUT,
                f"it is a pipe through which nothing came for {SILENT_PIPE_SECONDS:g} s; give a "
                "file, or see whether its other end still writes",
                str(path),
            )
        part = os.read(descriptor, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > most:
            raise OSError(
                errno.EFBIG,
                f"it is a pipe that did not end within {most:,} bytes; write what it gives into a "
                "file, and give that",
                str(path),
            )


def _wait(descriptor: int) -> bool:
    """Wait for data or for the end; False if neither comes in time.

    Before its first writer comes, a pipe that was opened without waiting looks like one that has
    ended to ``read``, but not to ``poll``.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * SILENT_PIPE_SECONDS))
