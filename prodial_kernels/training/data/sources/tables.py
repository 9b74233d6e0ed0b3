"""Rows of a file: JSON lines, a JSON array, CSV, TSV or Parquet; each row with where it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prodial_kernels.files.json_values import each_once
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.findings import Findings
from prodial_kernels.training.data.schemas import KEYS
from prodial_kernels.training.data.sources.text_files import read_text

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet")

# Python's own limit of 128 KiB is no limit of the format.
_LONGEST_FIELD = 1 << 30


def rows_of(path: Path, findings: Findings) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file by its ending, one of :data:`TABLE_SUFFIXES`.

    Yields:
        Where the row is (``rows.csv:7``), and the row.

    Raises:
        DataError: The file cannot be read, or a row is malformed; with file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    text = read_text(path, findings)
    if suffix in (".csv", ".tsv"):
        return _separated(path, text, "\t" if suffix == ".tsv" else ",", findings)
    if text.lstrip().startswith("["):
        return _json_array(path, text)
    return _json_lines(path, text)


def parsed_json(text: str, where: Callable[[int], str], advice: str) -> Any:
    """Parse JSON from a user's file.

    Args:
        text: The JSON.
        where: Names the place of a line of ``text``, from 1.
        advice: What to do about JSON that is not valid.

    Raises:
        DataError: Not valid, nested too deeply, a number of too many digits, or a key given twice.
    """
    try:
        return json.loads(text, object_pairs_hook=each_once)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{where(error.lineno)}: not valid JSON: {error.msg} at column {error.colno}: "
            f"{line:.60}\n{advice}"
        ) from None
    except RecursionError:
        raise DataError(f"{where(1)}: JSON that is nested too deeply to be data") from None
    # Python's limit on the digits of an integer; and a key given twice.
    except ValueError as error:
        raise DataError(f"{where(1)}: not usable JSON: {error}") from None


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not str.splitlines: it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        advice = "Each line must be one whole JSON object, or the file one JSON array of them"
        yield where, parsed_json(line, lambda _, where=where: where, advice)  # type: ignore[misc]


def _json_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    advice = "The file must be one JSON array of objects, or one object on each line"
    rows = parsed_json(text, lambda line: f"{path}:{line}", advice)
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _separated(
    path: Path, text: str, delimiter: str, findings: Findings
) -> Iterator[tuple[str, Mapping[str, str]]]:
    first = text.split("\n", 1)[0]
    if delimiter == "," and "," not in first:
        # What spreadsheets write where the comma is the decimal point.
        other = next((mark for mark in (";", "\t") if mark in first), None)
        if other is not None:
            delimiter = other
            findings.remark(f"{path.name}: columns are taken to be divided by {other!r}")
    header: list[str] | None = None
    for line, values in _fields(path, text, delimiter):
        if header is None:
            header = [name.strip() for name in values]
            shown = f"{', '.join(map(repr, header)):.200}"
            if len(set(header)) < len(header) or not all(header):
                raise DataError(
                    f"{path}:{line}: the first line must name every column, each differently; got "
                    f"{shown}. If the file has no line of names, add one, such as prompt,completion"
                )
            if not KEYS & {*header}:
                raise DataError(
                    f"{path}:{line}: the first line must name the columns, and none of {shown} is "
                    "a name that rows have. If the file has no line of names, add one, such as "
                    "text, or prompt,completion; else rename its columns: text; prompt, "
                    "completion; instruction, input, output; context, choices, label"
                )
            continue
        if len(values) != len(header):
            raise DataError(
                f"{path}:{line}: {len(values)} fields, but the first line names {len(header)} "
                f"columns; quote fields that hold {delimiter!r} or line ends"
            )
        yield f"{path}:{line}", dict(zip(header, values, strict=True))


def _fields(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line that a row begins in, and its fields; rows without any are left out."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    while True:
        # A quoted field may hold line ends, so a row may begin far above where it ends.
        line = reader.line_num + 1
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: not valid {path.suffix[1:].upper()}: {error}; see whether every "
                "quote is closed, and doubled inside quotes"
            ) from None
        finally:
            csv.field_size_limit(before)
        if values is None:
            return
        if values:
            yield line, values


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs the library 'pyarrow', which comes with 'datasets': "
            "pip install datasets; or save the rows as JSONL"
        ) from error
    if not path.is_file():
        raise DataError(f"{path}: cannot be read as Parquet: it is no regular file")
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path} row {index}", row
                    index += 1
    # pyarrow has classes of its own for each kind of damage; some of them are OSErrors.
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read as Parquet: {type(error).__name__}: {error!s:.200}; text must "
            "not be named .parquet"
        ) from error
