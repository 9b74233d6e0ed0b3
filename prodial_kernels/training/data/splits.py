"""The data of a fine-tuning run: load and split it, and make training batches of it.

split = load_documents("stdlib", max_bytes=2_000_000)
batches = make_batches(split.train, tokenizer, seq_len=512, batch_size=8, seed=0)
batch = batches.batch(step)            # any step, in any order, always the same
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from prodial_kernels._checks import similar_path
from prodial_kernels.training.data.batches import BatchSizes, TrainingBatches
from prodial_kernels.training.data.chat import rendered
from prodial_kernels.training.data.documents import separate_documents
from prodial_kernels.training.data.examples import DataError, Example, Kind, kind_of, text_bytes
from prodial_kernels.training.data.findings import Findings, all_lines
from prodial_kernels.training.data.packing import PackedBatches
from prodial_kernels.training.data.padding import PaddedBatches
from prodial_kernels.training.data.schemas import BLANK
from prodial_kernels.training.data.sources.hub import hub_candidates
from prodial_kernels.training.data.sources.objects import GIVEN, object_candidates
from prodial_kernels.training.data.sources.paths import (
    TEXT_SUFFIXES,
    Candidates,
    directory_candidates,
    file_candidates,
    stdlib_candidates,
)
from prodial_kernels.training.data.sources.tables import TABLE_SUFFIXES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceName: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = SourceName | Iterable[Any]
"""The name of a source, or rows in memory (see ``sources/objects.py``)."""

# Up to so many documents the held-out share is met by counting.
_DIVIDED_BY_COUNT = 100
_OVER_BUDGET = "over max_bytes"


@dataclass(frozen=True, slots=True)
class DataSplit:
    """Examples to train on and examples held out, all of one kind.

    Both lists are in a fixed pseudo-random order, so any prefix is an even sample of its side.

    Attributes:
        name: The source, for people.
        train: What to train on.
        held_out: What to evaluate on.
        notes: What reading changed, left out, cut or guessed, a line each.
    """

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What all examples are."""
        return kind_of(self.train)

    def __str__(self) -> str:
        """Describe the split in one line, and what reading changed in a line each."""
        train, held_out = (
            f"{len(side):,} examples ({sum(map(text_bytes, side)):,} bytes)"
            for side in (self.train, self.held_out)
        )
        sides = f"{self.name}: {train} to train on, {held_out} held out"
        return "\n  ".join([sides, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return what people ask later of the data, as plain JSON-ready values."""
        return {
            "name": self.name,
            "train": len(self.train),
            "held_out": len(self.held_out),
            "notes": list(self.notes),
        }


class WholeData(NamedTuple):
    """All examples of a source, and what reading changed, left out, cut or guessed."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...]


def load_documents(
    source: Source | None = None,
    *,
    held_out_fraction: float = 0.1,
    held_out_source: Source | None = None,
    max_bytes: int | None = None,
    suffixes: Sequence[str] | None = None,
) -> DataSplit:
    """Load data and split it into train and held-out, the same way on every machine and run.

    The side of a document follows from a hash of its relative path (files) or of its content
    (rows and texts within a file), never from its place in the source, and equal rows never stand
    on both sides. Up to a hundred documents are divided by the nearest count; of more, adding
    some does not move others across. A source with a single text gives its tail to the held-out
    side, and a hub data set its own validation or test split.

    Args:
        source: ``None`` or ``"stdlib"`` for the running Python's standard library, a text file
            (documents separated by blank lines; a program is one document), a table of rows in
            one of the schemas of ``schemas.py`` (JSONL, a JSON array, CSV, TSV, Parquet), a
            directory of text and code files, a hub name (``NAME`` or ``NAME:CONFIGURATION``), or
            rows in memory: a list, a ``datasets.Dataset``, splits by name.
        held_out_fraction: Share of documents, and of ``max_bytes``, to hold out; 0 < it < 1.
        held_out_source: Takes the whole of another source as held-out; ``source`` is then not
            split.
        max_bytes: UTF-8 bytes of text to take from both sides together. A larger budget always
            includes what a smaller one takes. The last text is cut at a line end to fit.
        suffixes: File suffixes to take from a directory.

    Raises:
        DataError: Nothing usable at the source; the message says what and how to go on.
        ValueError: ``held_out_fraction`` or ``max_bytes`` is out of range.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}")
    if max_bytes is not None and max_bytes < 2:
        raise ValueError(f"max_bytes must be at least 2, got {max_bytes}")
    # Each side has at least one byte of its own.
    held_out_bytes = None if max_bytes is None else max(1, round(max_bytes * held_out_fraction))
    train_bytes = None if max_bytes is None else max(1, max_bytes - (held_out_bytes or 0))

    candidates, held_out_candidates = _open(source, suffixes)
    if held_out_source is not None:
        held_out_candidates = _whole(held_out_source, suffixes, "held_out")
    if held_out_candidates is not None:
        train_side, held_out_side = _order(candidates), _order(held_out_candidates)
    elif len(candidates.positions) == 1:
        candidates = _halves(candidates, held_out_fraction)
        held_out_candidates, train_side, held_out_side = candidates, [0], [1]
    else:
        held_out_candidates = candidates
        train_side, held_out_side = _sides(candidates, held_out_fraction)

    train = _take(candidates, train_side, train_bytes)
    held_out = _take(held_out_candidates, held_out_side, held_out_bytes)
    for side, examples in (("train", train), ("held-out", held_out)):
        if not examples:
            raise DataError(
                f"{candidates.name}: the {side} split is empty. Give more data, another held-out "
                "fraction, a larger byte budget, or a held-out source of its own"
            )
    if kind_of(train) != kind_of(held_out):
        raise DataError(
            f"{candidates.name} holds {kind_of(train)} examples, but {held_out_candidates.name} "
            f"holds {kind_of(held_out)}; train and held-out data must be of one kind"
        )
    _count_repeated([*train, *held_out], candidates.findings)
    # Equal ones are on one side, unless the held-out side is a source of its own.
    seen = set(train)
    both = sum(example in seen for example in held_out)
    candidates.findings.count("held out, though trained on as well", "example", n=both)
    notes = all_lines([candidates.findings, held_out_candidates.findings])
    return DataSplit(candidates.name, tuple(train), tuple(held_out), notes)


def read_whole(
    source: Source, *, max_bytes: int | None = None, suffixes: Sequence[str] | None = None
) -> WholeData:
    """Load data to evaluate on, in a fixed pseudo-random order, and say what reading changed.

    Arguments and DataError are those of :func:`load_documents`; nothing is split, and of a hub data
    set it is the validation or test split.
    """
    candidates = _whole(source, suffixes)
    examples = _take(candidates, _order(candidates), max_bytes)
    if not examples:
        raise DataError(
            f"{candidates.name}: no usable text"
            + "".join(f"\n  {line}" for line in candidates.findings.lines())
        )
    _count_repeated(examples, candidates.findings)
    return WholeData(tuple(examples), candidates.findings.lines())


def make_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    mask_prompt: bool = True,
    packing: str = "stream",
    apart: Collection[str] = (),
) -> TrainingBatches:
    """Tokenise examples and arrange them into training batches.

    Args:
        examples: Examples of one kind. Texts are packed into windows of ``seq_len`` tokens;
            prompt/completion, conversations (each turn of the assistant's) and multiple choice
            (its right choice) are padded.
        tokenizer: A Hugging Face tokenizer with an EOS token.
        seq_len: Tokens in a window, and the most in a padded sequence.
        batch_size: Sequences in a batch.
        seed: Decides the order of every epoch.
        mask_prompt: Train on the completion or choice only, not on what it follows. Not used for
            texts.
        packing: Of texts: ``"stream"`` joins them, ``"documents"`` keeps them apart.
        apart: What keeps documents of one window apart in the model (see ``packed_rows.py``); if
            nothing does, ``"documents"`` pads.

    Raises:
        DataError: No examples, more than one kind, or too little text for one window.
        ValueError: A size is out of range.
    """
    sizes = BatchSizes(seq_len, batch_size, seed)
    if kind_of(examples) == "text":
        texts = [example for example in examples if isinstance(example, str)]
        if packing == "documents":
            return separate_documents(texts, tokenizer, sizes, apart=apart)
        return PackedBatches.from_documents(texts, tokenizer, sizes)
    rows = rendered([example for example in examples if not isinstance(example, str)], tokenizer)
    return PaddedBatches.from_examples(rows, tokenizer, sizes, mask_prompt=mask_prompt)


def _open(
    source: Source | None, suffixes: Sequence[str] | None, argument: str = "data"
) -> tuple[Candidates, Candidates | None]:
    """Find what a source is; return its candidates and its own held-out ones, if it has any."""
    if source is not None and not isinstance(source, (str, os.PathLike)):
        return object_candidates(source, argument=argument)
    if source == GIVEN:
        raise DataError(
            f"{argument}: this run was given its rows in Python; give them again: "
            f"finetune(config, {argument}=rows, resume=True)"
        )
    if source is None or source == "stdlib":
        return stdlib_candidates(), None
    if not str(source).strip():
        raise DataError("the name of the data is empty; give a file, a directory or a hub name")
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if exists:
        return (
            directory_candidates(path, suffixes) if path.is_dir() else file_candidates(path)
        ), None
    # Everything else may be the name of a hub data set, which has at most one slash.
    if not isinstance(source, str) or (
        source.startswith((".", "~", os.sep))
        or source.count("/") > 1
        or "\\" in source
        or path.suffix.lower() in (*TABLE_SUFFIXES, *TEXT_SUFFIXES)
    ):
        raise DataError(
            f"{source}: no such file or directory (looked in {Path.cwd()}){similar_path(path)}"
        )
    return hub_candidates(source)


def _whole(source: Source, suffixes: Sequence[str] | None, argument: str = "data") -> Candidates:
    candidates, held_out = _open(source, suffixes, argument)
    return held_out or candidates


def _order(candidates: Candidates) -> list[int]:
    return sorted(range(len(candidates.positions)), key=candidates.positions.__getitem__)


def _sides(candidates: Candidates, held_out_fraction: float) -> tuple[list[int], list[int]]:
    """Split into train and held-out by position; each side gets at least one distinct document."""
    order = _order(candidates)
    positions = [candidates.positions[i] for i in order]
    if positions[0] == positions[-1]:
        raise DataError(
            f"{candidates.name}: all {len(positions)} documents are equal, so nothing can be held "
            "out; give more data or a held-out source"
        )
    # Where a side may begin: never between equal documents.
    cuts = [i for i in range(1, len(order)) if positions[i - 1] < positions[i]]
    wanted = bisect_left(positions, held_out_fraction)
    if len(order) <= _DIVIDED_BY_COUNT:
        # Hashes are even in the long run only: of 40 documents a tenth may come out as 7.
        wanted = round(len(order) * held_out_fraction)
    cut = min(cuts, key=lambda i: (abs(i - wanted), i))
    return order[cut:], order[:cut]


def _halves(candidates: Candidates, held_out_fraction: float) -> Candidates:
    """Cut a single text in two, at a line end where there is one, else between words."""
    text = candidates.read(0)
    if not isinstance(text, str) or len(text.split()) < 2:
        raise DataError(
            f"{candidates.name}: a single document that cannot be divided; give at least two, or "
            "a held-out source"
        )
    target = len(text) - max(1, round(len(text) * held_out_fraction))
    cut = text.rfind("\n", 1, target) + 1 or text.rfind(" ", 1, target) + 1 or target
    parts = (text[:cut], text[cut:])
    candidates.findings.remark(
        f"one text: its last {len(parts[1]):,} of {len(text):,} characters are held out"
    )
    return Candidates(candidates.name, (0.0, 1.0), parts.__getitem__, candidates.findings)


def _take(candidates: Candidates, order: Sequence[int], max_bytes: int | None) -> list[Example]:
    """Read in order until the budget is used up."""
    examples: list[Example] = []
    findings = candidates.findings
    left = max_bytes
    for place, index in enumerate(order):
        example = candidates.read(index)
        if example is None:
            continue
        if isinstance(example, str) and not example.strip():
            findings.count(BLANK, "document")
            continue
        if left is not None:
            left -= text_bytes(example)
            if left < 0:
                unused = len(order) - place
                if isinstance(example, str):
                    example = _cut(example, len(example.encode()) + left)
                # A row cannot be cut; the first one is taken even if it is over the budget.
                if example if isinstance(example, str) else not examples:
                    examples.append(example)
                    unused -= 1
                    if isinstance(example, str):
                        findings.count(f"cut at its end, {_OVER_BUDGET}", "document")
                findings.count(f"left out, {_OVER_BUDGET}", "document", n=unused)
                break
        examples.append(example)
    return examples


def _count_repeated(examples: Sequence[Example], findings: Findings) -> None:
    repeated = len(examples) - len(set(examples))
    findings.count(f"kept, repeats another one of {len(examples):,}", "example", n=repeated)


def _cut(text: str, max_bytes: int) -> str:
    """Return the longest start of a text within a budget that ends a line, or any, if none does."""
    start = text.encode()[:max_bytes].decode(errors="ignore")
    return start[: start.rfind("\n") + 1] or start
