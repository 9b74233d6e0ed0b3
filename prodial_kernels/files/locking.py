"""One process at a time in a directory.

The system's own lock on the directory where there is one: it ends with the process that holds it.
Elsewhere (Windows, and file systems without ``flock`` on directories, as NFS) a file ``.lock`` in
the directory: locked itself on Windows, else created exclusively with the holder's name in it, and
taken over from a process of this machine that has ended.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from prodial_kernels.files.process import has_ended, process_name

LOCK_FILE = ".lock"
_SECONDS_BETWEEN_TRIES = 0.02
_NO_FLOCK = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_Release = Callable[[], None]


class AlreadyLocked(RuntimeError):
    """Another process holds the lock; the message says what is known of it."""


@contextmanager
def locked(directory: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of an existing directory; wait so many seconds for another process.

    Raises:
        AlreadyLocked: Another process still holds it.
        OSError: There is no such directory, or it cannot be read (or written, for ``.lock``).
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            release = _take(directory)
            break
        except AlreadyLocked:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_SECONDS_BETWEEN_TRIES)
    try:
        yield
    finally:
        release()


def _take(directory: Path) -> _Release:
    fcntl = _module("fcntl")
    if fcntl is not None:
        release = _take_directory(directory, fcntl)
        if release is not None:
            return release
    msvcrt = _module("msvcrt")
    if msvcrt is not None:
        return _take_region(directory / LOCK_FILE, msvcrt)
    return _take_file(directory / LOCK_FILE)


def _module(name: str) -> Any:
    """Import a module that only some systems have, by name so that type checkers do not ask."""
    try:
        return import_module(name)
    except ImportError:
        return None


def _take_directory(directory: Path, fcntl: Any) -> _Release | None:
    """Lock the directory itself; None where the file system has no such lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(descriptor), os.stat(directory)
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise AlreadyLocked(f"{directory} was replaced at this moment")
    except BlockingIOError as error:
        os.close(descriptor)
        raise AlreadyLocked(f"another process is running in {directory}; wait for it") from error
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in _NO_FLOCK:
            return None
        raise
    return partial(os.close, descriptor)


def _take_region(file: Path, msvcrt: Any) -> _Release:
    """Lock the first byte of a file, as Windows can."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            message = f"another process is running in {file.parent}; wait for it"
            raise AlreadyLocked(message) from error
        raise

    def release() -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        os.close(descriptor)
        # Windows refuses while another process has it open.
        with suppress(OSError):
            file.unlink()

    return release


def _take_file(file: Path) -> _Release:
    """Create a file that says who holds the lock."""
    content = f"{process_name()} {secrets.token_hex(8)}\n".encode()
    while True:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if not _removed_stale(file):
                raise AlreadyLocked(
                    f"another process is running in {file.parent}; wait for it (where none is "
                    f"running any more, remove {file})"
                ) from None
            continue
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)
        return partial(_release_file, file, content)


def _release_file(file: Path, content: bytes) -> None:
    with suppress(OSError):
        if file.read_bytes() == content:
            file.unlink()


def _removed_stale(file: Path) -> bool:
    """Remove the lock of a process that has ended; return whether to try again."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return True
    if not has_ended(content.decode(errors="replace").partition(" ")[0]):
        return False
    # Only one process may remove this very lock: by then there may be a new one under its name.
    turn = file.with_name(f"{file.name}.{hashlib.sha256(content).hexdigest()[:16]}")
    try:
        os.close(os.open(turn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError:
        return False
    try:
        if file.read_bytes() == content:
            file.unlink()
    except FileNotFoundError:
        pass
    finally:
        turn.unlink(missing_ok=True)
    return True
