"""What somebody may have meant who wrote a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

# A directory of more files is not searched whole for a name like the one that was given.
_MOST_NAMES = 10_000


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like ``word``; None if none is much like it."""
    from difflib import get_close_matches

    by_folded = {name.casefold(): name for name in known}
    found = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'NAME'?"``, or nothing."""
    name = closest(word, known)
    return "" if name is None else f"; did you mean {name!r}?"


def similar_path(path: Path) -> str:
    """Return ``"; did you mean 'PATH'?"`` with a neighbour of a path that does not exist."""
    try:
        if not path.parent.is_dir():
            above = similar_path(path.parent) if path.parent != path else ""
            return above or f"; there is no directory {str(path.parent)!r} either"
        names = [entry.name for entry in islice(path.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return ""
    name = closest(path.name, names)
    return "" if name is None else f"; did you mean {str(path.parent / name)!r}?"
