"""Files and directories that appear whole or not at all, whatever happens meanwhile.

The package's only way to write a file that somebody keeps: under a temporary name that no other
process uses and that is not followed as a link, flushed to the disk, then renamed. Each function
that writes raises OSError where the disk is full, or the place cannot be written.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prodial_kernels.files.process import NAME_FORM, has_ended, process_name

if TYPE_CHECKING:
    from torch import Tensor

_TRIES = 100


@contextmanager
def atomic_directory(
    path: Path, *, own_files: Callable[[Path], Sequence[str]] | None = None
) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` that takes its place when the block succeeds.

    Everything in it is flushed to the disk before the rename, and gets the mode that the umask
    gives to new files. When the block raises, the temporary directory is removed and ``path`` is as
    it was. Of two processes that write one ``path`` the later one's directory stays, whole.

    Args:
        path: Where the directory will be; its parent is created.
        own_files: Says what a directory at ``path`` consists of, relative to it; raises where it
            must not be replaced. The old directory is moved aside until the new one is in place.
            Then these files of it are deleted, and nothing else. None: nothing is replaced.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.
        OSError: The disk is full, or the place cannot be written.
    """
    if own_files is None and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "already exists", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path, "partial")
    try:
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                # safetensors lets nobody but the owner read what it writes.
                file.chmod(mode)
            flush(file)
        flush(temporary)
        _put(temporary, path, own_files)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put(temporary: Path, path: Path, own_files: Callable[[Path], Sequence[str]] | None) -> None:
    """Rename ``temporary`` to ``path``; retry where another process does the same."""
    for _ in range(_TRIES):
        previous = beside(path, "previous")
        names: tuple[str, ...] = ()
        if os.path.lexists(path):
            if own_files is None:
                raise FileExistsError(errno.EEXIST, "already exists", str(path))
            with suppress(FileNotFoundError):
                names = tuple(own_files(path))
        try:
            with suppress(FileNotFoundError):
                os.rename(path, previous)
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        finally:
            if not os.path.lexists(path) and previous.exists():
                os.rename(previous, path)
        remove_files(previous, names)
        if not temporary.exists():
            flush(path.parent)
            return
    raise FileExistsError(errno.EEXIST, "other processes keep writing there", str(path))


def remove_files(directory: Path, names: Sequence[str]) -> None:
    """Delete these files, in this order, and the directories that are empty then."""
    folders = {directory}
    for name in names:
        file = directory / name
        with suppress(OSError):
            file.unlink()
        folders.update(p for p in file.parents if p.is_relative_to(directory))
    for folder in sorted(folders, key=lambda p: len(p.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def atomic_text(path: Path, text: str) -> None:
    """Write a text file in one step, flushed to the disk; its directory must be there."""
    with atomic_file(path) as temporary:
        write_new(temporary, text.encode("utf-8"))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write a new file under, which then takes its place."""
    temporary = beside(path, "partial")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file."""
    from safetensors.torch import save_file

    with safetensors_errors(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Turn safetensors' own error about a failed write into an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def beside(path: Path, kind: str) -> Path:
    """Return a name beside ``path`` that no other process will choose; it ends in ``kind``."""
    return path.with_name(f".{path.name}.{process_name()}-{secrets.token_hex(8)}.{kind}")


def left_beside(path: Path, kind: str, *, ended: bool = False) -> list[Path]:
    """Return the paths that :func:`beside` gave out; ``ended``: of processes that have ended."""
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
    """Flush a file, or a directory's entries, to the disk, where the system supports it."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
