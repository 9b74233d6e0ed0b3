"""Recognising directories that this package wrote, the only ones that it replaces.

A written model has a file :data:`MARKER` beside its own with every file's size and SHA-256. Only
what still is exactly that is ever replaced: a file more, or one that changed, is somebody's work.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prodial_kernels._checks import some_of
from prodial_kernels.files.atomic import left_beside, remove_files
from prodial_kernels.files.sha256 import sha256_of_file

MARKER = "prodial_files.json"
FORMAT_VERSION = 1


class PlaceError(RuntimeError):
    """A directory cannot be written where it was asked for, because something else is there."""


def mark_written(directory: Path) -> None:
    """List every file in a directory as written by this package."""
    from prodial_kernels._version import __version__

    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MARKER:
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    values = {"format_version": FORMAT_VERSION, "package_version": __version__, "files": files}
    (directory / MARKER).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def own_files(path: Path) -> list[str]:
    """Return the files of a directory that may be replaced, the marker last; none of an empty one.

    Raises:
        FileNotFoundError: Nothing is there.
        PlaceError: It is no directory, or holds anything that this package did not write there.
    """
    if path.is_symlink() or not path.is_dir():
        if not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        raise PlaceError(f"{path} is not a directory; it is left alone: choose another place")
    found = {
        p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()
    }
    folders = (p for p in path.rglob("*") if p.is_dir() and not p.is_symlink())
    empty_folders = sorted(p.relative_to(path).as_posix() for p in folders if not any(p.iterdir()))
    if not found and not empty_folders:
        return []
    listed = _listed(path)
    if listed is None:
        raise PlaceError(
            f"{path} holds {some_of(sorted(found) or empty_folders)}, and is no model that "
            "'prodial' wrote: only such a one, or an empty directory, is replaced. Choose another "
            "place"
        )
    foreign = sorted(found - listed.keys() - {MARKER}) + empty_folders
    if foreign:
        raise PlaceError(
            f"{path} was written by 'prodial', but {some_of(foreign)} in it was not: move that "
            "away, or choose another place"
        )
    changed = [name for name in sorted(found - {MARKER}) if not _is(path / name, listed[name])]
    if changed:
        raise PlaceError(
            f"{some_of(changed)} in {path} was changed since 'prodial' wrote it: move the "
            "directory away, or choose another place"
        )
    return [*sorted(found - {MARKER}), MARKER]


def check_place(path: Path, apart: Mapping[str, Path], *, around: Mapping[str, Path]) -> None:
    """Raise where a directory to write overlaps with others.

    Args:
        path: Where a directory is to be written; without links in it.
        apart: What it must neither be, nor hold, nor lie in, by what people call it.
        around: What it must neither be nor hold.

    Raises:
        PlaceError: Says which.
        PermissionError: Nothing may be written there.
    """
    for what, other in {**apart, **around}.items():
        if not other.exists():
            continue
        other = other.resolve()
        if _is_in(other, path):
            verb = "is" if _is_in(path, other) else "holds"
            raise PlaceError(f"{path} {verb} {what} ({other}); choose another place")
        if what in apart and _is_in(path, other):
            raise PlaceError(f"{path} lies in {what} ({other}); choose another place")
    if os.path.ismount(path):
        raise PlaceError(
            f"{path} is a mount point, which nothing can be moved to; name a directory in it"
        )
    beside = next(parent for parent in path.parents if parent.exists())
    if not os.access(beside, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(beside))


def clear_leftovers(path: Path) -> None:
    """Clean up beside ``path`` after processes that were killed while they wrote it.

    The old directory comes back where one was killed between its two renames.
    """
    for previous in left_beside(path, "previous"):
        listed = _listed(previous)
        if listed is None:
            continue
        if not os.path.lexists(path):
            os.rename(previous, path)
        else:
            remove_files(previous, [*listed, MARKER])
    for unfinished in left_beside(path, "partial", ended=True):
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)


def _listed(directory: Path) -> dict[str, Any] | None:
    """Return a directory's files as its marker lists them; None without a valid marker.

    It may come from anywhere: a name that leads out of the directory makes it none.
    """
    file = directory / MARKER
    if directory.is_symlink() or file.is_symlink() or not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        sound = values["format_version"] == FORMAT_VERSION
        files: dict[str, Any] = values["files"]
        for name, entry in files.items():
            parts = PurePosixPath(name).parts
            sound &= bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute()
            sound &= isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return files if sound else None


def _is(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is as it was listed."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size != entry["bytes"]:
        return False
    return sha256_of_file(file) == entry["sha256"]


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or below it, also through links and other names."""
    if path == folder or folder in path.parents:
        return True
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))
