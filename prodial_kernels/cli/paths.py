"""Finding the adapter that a path means: its directory, that of its run, or a file in it."""

from __future__ import annotations

import json
from pathlib import Path

from prodial_kernels._checks import similar_path

_DESCRIPTION = "adapter_config.json"
# What a run calls its parts. Nobody means a hub id by a path that ends so.
_PARTS_OF_A_RUN = ("adapter", "merged", "model")


class PathError(ValueError):
    """A path does not lead to what is needed."""


def adapter_directory(path: str, *, flag: str = "--adapter") -> str:
    """Return the directory of an adapter.

    Args:
        path: That directory, the run's that wrote it, or a file of the adapter.
        flag: What the path was given as, for errors.

    Raises:
        PathError: There is no adapter; says what is there instead.
    """
    place = Path(path).expanduser()
    for candidate in (place, place / "adapter"):
        if (candidate / _DESCRIPTION).is_file():
            return str(candidate)
    if place.is_file() and (place.parent / _DESCRIPTION).is_file():
        return str(place.parent)
    shown = f"{flag} {path}".lstrip()
    raise PathError(f"{shown}: {_what_is_there(place)}")


def inspected(path: str) -> str:
    """Return what to inspect where a path is given: of a run its adapter, else the path.

    Raises:
        PathError: The path can only be a file's or a directory's, and there is none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        described = any((place / part / _DESCRIPTION).is_file() for part in (".", "adapter"))
        if described and not (place / "config.json").is_file():
            return adapter_directory(path)
    elif place.is_file():
        return adapter_directory(path, flag="")
    elif len(place.parts) > 1 and place.name in _PARTS_OF_A_RUN:
        raise PathError(f"{path}: no such directory (looked in {Path.cwd()}){similar_path(place)}")
    return path


def _trained_whole(run: Path) -> bool:
    try:
        record = json.loads((run / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    config = record.get("config") if isinstance(record, dict) else None
    return isinstance(config, dict) and config.get("method") == "full"


def _what_is_there(place: Path) -> str:
    wanted = "give the directory of an adapter, or of the run that wrote it"
    if not place.exists():
        return f"no such directory (looked in {Path.cwd()}); {wanted}{similar_path(place)}"
    if not place.is_dir():
        return f"no such directory: it is a file, and no adapter lies beside it; {wanted}"
    if (place / "config.json").is_file():
        return f"it holds a model, not an adapter; {wanted}"
    if _trained_whole(place):
        return (
            "this run trained every weight (--method full) and has no adapter: what it writes is "
            f"a model, {place / 'model'}; give that with --model"
        )
    if (place / "run.json").is_file():
        return (
            "this run has no adapter yet: it is saved at its end. Continue it with: prodial "
            f"finetune --resume --output {place}"
        )
    return f"it holds no adapter (no {_DESCRIPTION} in it); {wanted}"
