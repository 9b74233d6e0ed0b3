"""A row: one training of one method, and how rows are stored and found again."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Recipe", "Row", "Spec", "append", "finite", "read_rows"]


@dataclass(frozen=True)
class Recipe:
    """How every method is trained: AdamW, warm-up, cosine to zero.

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples a step.
        max_length: Tokens of a prompt with its answer; longer prompts lose their beginning.
        weight_decay: Of everything that trains.
        warmup: Share of the steps.
        clip: Largest gradient norm.
        limit: Most examples of validation and test that are scored; 0 for all.
    """

    steps: int = 250
    batch_size: int = 32
    max_length: int = 128
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    limit: int = 0


@dataclass(frozen=True)
class Spec:
    """What decides a row's numbers.

    Attributes:
        base: Name of the base.
        task: Name of the task.
        method: Name of the method.
        budget: ``"small"``, ``"medium"``, ``"large"`` or ``"own"``.
        learning_rate: Peak rate.
        seed: Of the adapter's and classifier's start, and of the batches' order.
        recipe: The rest of the training.
    """

    base: str
    task: str
    method: str
    budget: str
    learning_rate: float
    seed: int
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that name the row."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """What a sweep of learning rates is for."""
        return self.base, self.task, self.method, self.budget


@dataclass
class Row:
    """A spec and what came out.

    Attributes:
        spec: See :class:`Spec`.
        phase: ``"sweep"`` (validation alone) or ``"final"``.
        status: ``"ok"``, ``"unfit"`` (the method does not exist for the base), ``"diverged"`` or
            ``"failed"``.
        figures: ``validation`` and ``test`` accuracy, ``loss`` (mean of the last tenth of the
            steps), ``parameters``, ``head``, ``target``, ``total``, ``seconds``,
            ``tokens_per_second`` (padding counted; images for vision), ``peak_bytes``. Where
            runs were trained at once, ``together`` is how many, ``seconds`` a run's share and
            ``tokens_per_second`` that of them all.
        where: Device and versions.
        note: The error's message.
    """

    spec: Spec
    phase: str
    status: str = "ok"
    figures: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"id": self.spec.id, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read a line. Fields that others have added to it are left out."""
        values = json.loads(line)
        spec = values["spec"]
        known = {f.name for f in fields(Recipe)}
        recipe = Recipe(**{k: v for k, v in spec.pop("recipe").items() if k in known})
        own = {f.name for f in fields(cls)} - {"spec"}
        return cls(Spec(**spec, recipe=recipe), **{k: v for k, v in values.items() if k in own})


def finite(row: Row) -> bool:
    """Whether a row's loss is; one that is not becomes ``"diverged"``."""
    loss = row.figures["loss"]
    if not math.isfinite(loss):
        row.status, row.note = "diverged", f"the loss is {loss}"
        return False
    return True


def append(path: Path, *rows: Row) -> None:
    """Append rows in one write, behind a whole line; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        # A kill may have left half a line.
        whole = size == 0 or os.pread(file, 1, size - 1) == b"\n"
        lines = "".join(row.to_json() + "\n" for row in rows)
        os.write(file, (("" if whole else "\n") + lines).encode())
        os.fsync(file)
    finally:
        os.close(file)


def read_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of every ``rows*.jsonl`` (or ``.jsonl.xz``) in a folder, each once.

    Half lines are left out.
    """
    seen = set()
    for path in sorted((*folder.glob("rows*.jsonl"), *folder.glob("rows*.jsonl.xz"))):
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        for line in text.splitlines():
            try:
                row = Row.from_json(line)
            except json.JSONDecodeError:
                continue
            if (key := (row.spec.id, row.phase)) not in seen:
                seen.add(key)
                yield row
