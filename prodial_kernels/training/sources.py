"""Where examples come from on this machine: the standard library, directories, text, JSONL.

A source lists what it has (:class:`Candidates`) before anything is read, so that a byte budget
reads only the files that it uses. The split into train and held-out is made in ``data.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prodial_kernels.training.schemas import DataError, Example, parse_rows

PROSE_SUFFIXES = (".txt", ".md", ".rst", ".tex", "")
# fmt: off
CODE_SUFFIXES = (
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".go", ".java",
    ".jl", ".js", ".ts", ".tsx", ".kt", ".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh",
    ".sql", ".swift",
)
# fmt: on
TEXT_SUFFIXES = (*PROSE_SUFFIXES[:-1], *CODE_SUFFIXES)
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")

_NEVER_ENTERED = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
# Tests are left out as unlike other code; the rest are tables and texts written by generators,
# megabytes in which a language model learns nothing about Python.
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
_STDLIB_GENERATED = ("config-", "_sysconfigdata")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The documents that a source has, not yet read.

    Attributes:
        name: The source, for people.
        positions: :func:`stable_position` of what identifies each document; the split and the
            order of reading follow from it alone.
        read: Returns document ``i``, or ``None`` where the file is not UTF-8 text.
    """

    name: str
    positions: Sequence[float]
    read: Callable[[int], Example | None]


def stable_position(key: str) -> float:
    """Map a key to [0, 1), evenly and the same on every machine, Python version and run."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=7).digest()
    # 56 bits shifted to 53, the precision of a double, so that 1.0 can never come out.
    return (int.from_bytes(digest, "big") >> 3) / 2**53


def stdlib_candidates() -> Candidates:
    """List the running interpreter's standard library: its ``.py`` files, by relative path.

    Raises:
        DataError: This interpreter ships no library source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_walk(root, {".py"}, _STDLIB_EXCLUDED, _STDLIB_GENERATED))
    if not files:
        raise DataError(
            f"no standard-library source (.py files) in {root}; give a file or directory of your "
            "own as data"
        )
    return _files(f"Python {platform.python_version()} standard library", root, files)


def directory_candidates(root: Path, suffixes: Sequence[str] | None) -> Candidates:
    """List the text and code files under a directory, by relative path.

    Args:
        root: The directory; hidden and dependency folders in it are not entered.
        suffixes: File suffixes to take, with or without the dot; ``None`` for the usual ones.

    Raises:
        DataError: No file has one of the suffixes.
    """
    wanted = {f".{s.lstrip('.')}".lower() for s in (suffixes or TEXT_SUFFIXES)}
    files = list(_walk(root, wanted))
    if not files:
        present = sorted({f.suffix or f.name for f in _walk(root, None)})
        found = f"it has {', '.join(present[:20])}" if present else "it has no files at all"
        raise DataError(
            f"{root}: no file ends in {', '.join(sorted(wanted))}; {found}. Name the suffixes to "
            "take, or give one file"
        )
    return _files(str(root), root, files)


def file_candidates(path: Path) -> Candidates:
    """List the documents of one file: JSONL rows, blank-line-separated texts, or one source file.

    Raises:
        DataError: The file cannot be read, is not UTF-8, is empty, or has an invalid row.
    """
    if path.suffix.lower() in JSON_LINES_SUFFIXES:
        return example_candidates(str(path), parse_rows(_json_lines(path)))
    text = read_text(path)
    if path.suffix.lower() in PROSE_SUFFIXES:
        return example_candidates(str(path), [c for c in re.split(r"\n\s*\n", text) if c.strip()])
    # A blank line inside a program separates nothing: the file is one document.
    return example_candidates(str(path), [text] if text.strip() else [])


def example_candidates(name: str, examples: Sequence[Example]) -> Candidates:
    """Wrap examples in memory; equal ones share a position, so also a side of the split.

    Raises:
        DataError: There are no examples.
    """
    if not examples:
        raise DataError(f"{name}: empty: there is no text in it")
    positions = [stable_position(repr(example)) for example in examples]
    return Candidates(name, positions, lambda i: examples[i])


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with any kind of newline as a line feed.

    Raises:
        DataError: Missing, not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.object[error.start]:#04x} at offset "
            f"{error.start}); convert it to UTF-8, or unpack it if it is compressed"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _files(name: str, root: Path, files: list[Path]) -> Candidates:
    def read(index: int) -> Example | None:
        try:
            return files[index].read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            return None
        except OSError as error:
            raise DataError(f"{files[index]}: cannot be read: {error.strerror or error}") from error

    positions = [stable_position(f.relative_to(root).as_posix()) for f in files]
    return Candidates(name, positions, read)


def _walk(
    root: Path,
    suffixes: AbstractSet[str] | None,
    excluded: AbstractSet[str] = frozenset(),
    excluded_prefixes: tuple[str, ...] = (),
) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith((".", *excluded_prefixes)) and f not in _NEVER_ENTERED | excluded
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith((".", *excluded_prefixes)) or not path.is_file():
                continue
            if suffixes is None or path.suffix.lower() in suffixes:
                yield path


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Not str.splitlines: it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON: {error.msg} at column {error.colno}: {line:.60}\n"
                "Each line must be one whole JSON object"
            ) from None
