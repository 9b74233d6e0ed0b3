"""Files that appear whole, under names that nobody else uses; nothing follows a link on the way."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from prodial_kernels.files.process import NAME_FORM, has_ended, process_name


def beside(path: Path, kind: str) -> Path:
    """Return a name in the directory of ``path`` that no other process will choose.

    Args:
        path: What is to be written or moved.
        kind: Last part of the name, such as ``"partial"``.
    """
    return path.with_name(f".{path.name}.{process_name()}-{secrets.token_hex(8)}.{kind}")


def left_beside(path: Path, kind: str, *, ended: bool = False) -> list[Path]:
    """Return what has a name that :func:`beside` gave out for ``path``.

    Args:
        path: As for :func:`beside`.
        kind: As for :func:`beside`.
        ended: Only what is of processes that have ended.
    """
    if not path.parent.is_dir():
        return []
    form = re.compile(rf"\.{re.escape(path.name)}\.({NAME_FORM})-[0-9a-f]{{16}}\.{kind}")
    found = [(p, form.fullmatch(p.name)) for p in path.parent.iterdir()]
    return sorted(p for p, m in found if m is not None and (not ended or has_ended(m.group(1))))


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, flushed to the disk; its mode follows the umask.

    Raises:
        OSError: Something, a link for one, has that name; or the disk is full.
    """
    # "x" is O_CREAT with O_EXCL, which also refuses to follow a link.
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk, where the system lets one ask."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
