"""Where examples come from on this machine: the standard library, directories, texts, tables.

A source lists what it has (:class:`Candidates`) before anything is read, so that a byte budget
reads only the files that it uses. The split into train and held-out is made in ``data.py``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from prodial_kernels.training.data.examples import DataError, Example
from prodial_kernels.training.data.findings import Findings
from prodial_kernels.training.data.schemas import parse_rows
from prodial_kernels.training.data.sources.tables import TABLE_SUFFIXES, rows_of
from prodial_kernels.training.data.sources.text_files import NotTextError, read_text

PROSE_SUFFIXES = (".txt", ".md", ".rst", ".tex", "")
# fmt: off
CODE_SUFFIXES = (
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".go", ".java",
    ".jl", ".js", ".ts", ".tsx", ".kt", ".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh",
    ".sql", ".swift",
)
# fmt: on
TEXT_SUFFIXES = (*PROSE_SUFFIXES[:-1], *CODE_SUFFIXES)

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
        findings: What reading changes, leaves out or guesses; counted by ``read``, too.
    """

    name: str
    positions: Sequence[float]
    read: Callable[[int], Example | None]
    findings: Findings = field(default_factory=Findings, compare=False)


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
    # What else is there (tests, compiled modules) is left out by design, so it is not counted.
    files = list(_walk(root, {".py"}, Findings(), _STDLIB_EXCLUDED, _STDLIB_GENERATED))
    if not files:
        raise DataError(
            f"no standard-library source (.py files) in {root}; give a file or directory of your "
            "own as data"
        )
    name = f"Python {platform.python_version()} standard library"
    return _files(name, root, files, Findings())


def directory_candidates(root: Path, suffixes: Sequence[str] | None) -> Candidates:
    """List the text and code files under a directory, by relative path.

    Args:
        root: The directory; hidden and dependency folders in it are not entered.
        suffixes: File suffixes to take, with or without the dot; ``None`` for the usual ones.

    Raises:
        DataError: No file has one of the suffixes.
    """
    wanted = {f".{s.lstrip('.')}".lower() for s in (suffixes or TEXT_SUFFIXES)}
    findings = Findings()
    files = list(_walk(root, wanted, findings))
    if not files:
        present = sorted({f.suffix or f.name for f in _walk(root, None, Findings())})
        found = f"it has {', '.join(present[:20])}" if present else "it has no files at all"
        raise DataError(
            f"{root}: no file ends in {', '.join(sorted(wanted))}; {found}. Name the suffixes to "
            "take, or give one file: rows (.jsonl, .csv, .parquet) are read from single files only"
        )
    return _files(str(root), root, files, findings)


def file_candidates(path: Path) -> Candidates:
    """List the documents of one file: a table's rows, texts between blank lines, or one program.

    Raises:
        DataError: The file cannot be read, is of another format than its ending says, is empty, or
            has an invalid row.
    """
    findings = Findings()
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        examples: Sequence[Example] = parse_rows(rows_of(path, findings), findings)
        return example_candidates(str(path), examples, findings)
    text = read_text(path, findings)
    if suffix in PROSE_SUFFIXES:
        # Also of pipes, which have no ending.
        texts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
        if len(texts) > 1:
            findings.remark(f"{path.name}: divided at blank lines into {len(texts):,} texts")
    else:
        # A blank line inside a program separates nothing: the file is one document.
        texts = [text] if text.strip() else []
        if suffix not in CODE_SUFFIXES:
            findings.remark(f"{path.name}: read as one plain text, as it stands")
    if suffix in PROSE_SUFFIXES and _like_json_lines(text):
        findings.remark(
            f"{path.name}: read as plain text, though its lines look like JSON; name it .jsonl to "
            "have its rows read"
        )
    return example_candidates(str(path), texts, findings)


def example_candidates(
    name: str, examples: Sequence[Example], findings: Findings | None = None
) -> Candidates:
    """Wrap examples in memory; equal ones share a position, so also a side of the split.

    DataError where there are none.
    """
    if not examples:
        raise DataError(f"{name}: empty: there is no text in it")
    positions = [stable_position(repr(example)) for example in examples]
    return Candidates(name, positions, lambda i: examples[i], findings or Findings())


def _files(name: str, root: Path, files: list[Path], findings: Findings) -> Candidates:
    def read(index: int) -> Example | None:
        try:
            return read_text(files[index], findings)
        except NotTextError:
            findings.count("skipped, not UTF-8 text", "file")
            return None

    positions = [stable_position(f.relative_to(root).as_posix()) for f in files]
    return Candidates(name, positions, read, findings)


def _like_json_lines(text: str) -> bool:
    """Whether each of the first lines is one JSON object by its looks."""
    lines = [line.strip() for line in text[:100_000].split("\n")[:3] if line.strip()]
    return bool(lines) and all(line[:1] == "{" and line[-1:] == "}" for line in lines)


def _walk(
    root: Path,
    suffixes: AbstractSet[str] | None,
    findings: Findings,
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
            else:
                findings.count(
                    "left out, by its ending", "file", detail=path.suffix.lower() or "no ending"
                )
