"""Files and directories that appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` that takes its place when the block succeeds.

    Everything in it is flushed to the disk before the rename. When the block raises, the temporary
    directory is removed and ``path`` is as it was. What a killed process left is removed next time.

    Args:
        path: Where the directory will be; its parent is created.
        replace: Whether an existing ``path`` is replaced. The old one is moved aside, not deleted,
            until the new one is in place.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.
        OSError: The disk is full, or the place cannot be written.
    """
    if path.exists() and not replace:
        raise FileExistsError(errno.EEXIST, "already exists", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    previous = path.with_name(f".{path.name}.previous")
    if previous.exists() and not path.exists():
        # A process was killed between its two renames: what it moved aside is the valid one.
        previous.rename(path)
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            flush(file)
        flush(temporary)
        if path.exists():
            path.rename(previous)
        temporary.rename(path)
        flush(path.parent)
    except BaseException:
        if previous.exists() and not path.exists():
            previous.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def atomic_text(path: Path, text: str) -> None:
    """Write a text file in one step, flushed to the disk.

    Raises:
        OSError: The disk is full, or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Bring a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OSError: The disk is full, or the place cannot be written.
    """
    from safetensors.torch import save_file

    with safetensors_errors(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turn safetensors' own error about a failed write into the OSError that it stands for."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
