"""Examples from objects of the caller's: rows in a list, a ``datasets.Dataset``, texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prodial_kernels.training.data.examples import (
    Conversation,
    DataError,
    Example,
    MultipleChoice,
    PromptCompletion,
)
from prodial_kernels.training.data.findings import Findings
from prodial_kernels.training.data.schemas import parse_rows
from prodial_kernels.training.data.sources.paths import Candidates, example_candidates
from prodial_kernels.training.data.sources.splits_of import train_and_held_out

GIVEN = "rows given in Python"
"""What data is called that has no name, where a run notes what it was trained on."""

_EXAMPLES = (PromptCompletion, Conversation, MultipleChoice)
_ACCEPTED = (
    "a list of rows such as {'text': '…'} or of texts, a datasets.Dataset, or a dictionary of such "
    "by split, as datasets.load_dataset returns"
)


def object_candidates(data: Any, *, argument: str = "data") -> tuple[Candidates, Candidates | None]:
    """Take rows that are in memory: those to train on, and held-out ones where splits say so.

    Args:
        data: Rows as ``schemas.py`` knows them, texts, or examples, in any iterable that can be
            read to its end; or a mapping of splits to such, from which a validation or test split
            is taken as held out.
        argument: What errors call it.

    Raises:
        DataError: It is something else, or a row follows no known schema.
    """
    if isinstance(data, Mapping):
        splits = {str(name): rows for name, rows in data.items()}
        if not splits or any(isinstance(rows, str) for rows in splits.values()):
            raise DataError(f"{argument} must be {_ACCEPTED}; a single row goes into a list")
        return train_and_held_out(
            splits, argument, lambda name: _rows_of(splits[name], f"{argument}[{name!r}]")
        )
    return _rows_of(data, argument), None


def _rows_of(data: Any, name: str) -> Candidates:
    if isinstance(data, (str, bytes, os.PathLike)):
        raise DataError(
            f"{name} must be {_ACCEPTED}; the name of a file or data set goes into the "
            f"configuration: FinetuneConfig(data={str(data)!r:.60})"
        )
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        raise DataError(f"{name} is a {type(data).__name__}; give its rows: .to_dict('records')")
    if not isinstance(data, Iterable):
        raise DataError(f"{name} must be {_ACCEPTED}, got {type(data).__name__}")
    findings = Findings()
    items = list(data)
    ready = [item for item in items if isinstance(item, _EXAMPLES)]
    if ready and len(ready) < len(items):
        raise DataError(f"{name} holds examples among rows; give all as one or the other")
    examples: list[Example] = list(ready) or parse_rows(_located(items, name), findings)
    return example_candidates(GIVEN, examples, findings)


def _located(items: list[Any], name: str) -> Iterator[tuple[str, Any]]:
    for index, item in enumerate(items):
        yield f"{name}[{index}]", {"text": item} if isinstance(item, str) else item
