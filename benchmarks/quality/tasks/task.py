"""What a task is, how examples fall into splits, and how tasks are stored."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "CAPS", "SPLITS", "ImageTask", "TextTask", "digest", "load_task", "number_of", "save_task",
    "split_of",
]  # fmt: skip

SPLITS = ("train", "validation", "test")
CAPS = {"train": 4000, "validation": 500, "test": 1000}
"""Most examples of a split; which ones stay is fixed by the hash, too."""


@dataclass(frozen=True)
class TextExample:
    """A prompt, what may follow it, and which of that is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass
class TextTask:
    """Multiple choice, or one of the same classes always: the likeliest continuation counts.

    Attributes:
        name: Of the task.
        about: Sources with versions and licences, what the examples are.
        per_byte: Whether a choice's log-likelihood is divided by its bytes: for choices of
            different lengths that are no classes.
        splits: Examples of each split.
    """

    name: str
    about: dict[str, Any]
    per_byte: bool
    splits: dict[str, list[TextExample]] = field(default_factory=dict)
    kind: str = "language"

    @property
    def chance(self) -> float:
        """Accuracy of guessing on the test split."""
        test = self.splits["test"]
        return sum(1 / len(e.choices) for e in test) / max(1, len(test))


@dataclass
class ImageTask:
    """Images with classes.

    Attributes:
        name: Of the task.
        about: Sources with versions and licences, what the classes are.
        classes: Their names.
        splits: Of each split, uint8 images [n, c, h, w] of one or three channels, int64 classes.
    """

    name: str
    about: dict[str, Any]
    classes: tuple[str, ...]
    splits: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    kind: str = "vision"

    @property
    def chance(self) -> float:
        """Accuracy on the test split of always saying its most frequent class."""
        labels = self.splits["test"][1]
        return max(Counter(labels.tolist()).values()) / max(1, len(labels))


def digest(text: str) -> int:
    """64 bits of BLAKE2b: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def number_of(text: str, below: int) -> int:
    """A number in [0, below) that the text decides."""
    return digest(f"number/{text}") % below


def split_of(key: str) -> str:
    """The split of everything that shares a key: 70% train, 10% validation, 20% test."""
    place = digest(f"split/{key}") % 100
    return "train" if place < 70 else "validation" if place < 80 else "test"


def capped(keyed: Iterable[tuple[str, Any]], caps: Mapping[str, int]) -> dict[str, list[Any]]:
    """Examples by split, from (key, example) pairs, in the order of their hashes."""
    found: dict[str, list[tuple[int, Any]]] = {split: [] for split in SPLITS}
    for i, (key, example) in enumerate(keyed):
        # Examples of one key are spread, too.
        found[split_of(key)].append((digest(f"order/{key}/{i}"), example))
    return {
        split: [example for _, example in sorted(rows, key=lambda row: row[0])[: caps[split]]]
        for split, rows in found.items()
    }


Task = TextTask | ImageTask


def save_task(task: Task, folder: Path) -> dict[str, Any]:
    """Write a task as one file; return its entry of ``tasks.json``, with a hash of the content."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(task, TextTask):
        lines = [json.dumps({"about": task.about, "per_byte": task.per_byte})]
        for split in SPLITS:
            for e in task.splits[split]:
                lines.append(json.dumps([split, e.prompt, e.choices, e.answer], ensure_ascii=False))
        content = ("\n".join(lines) + "\n").encode()
        path = folder / f"{task.name}.jsonl.xz"
    else:
        content = _arrays(task)
        path = folder / f"{task.name}.images.xz"
    data = lzma.compress(content, preset=9)
    path.write_bytes(data)
    return {
        "kind": task.kind,
        "examples": {split: _count(task, split) for split in SPLITS},
        "chance": round(task.chance, 4),
        "bytes": len(data),
        "sha256": hashlib.sha256(content).hexdigest(),
        **task.about,
    }


def _count(task: Task, split: str) -> int:
    return len(task.splits[split]) if isinstance(task, TextTask) else len(task.splits[split][1])


def _arrays(task: ImageTask) -> bytes:
    """A JSON line, then the arrays one after the other, as ``numpy.save`` writes them."""
    out = io.BytesIO()
    out.write(json.dumps({"about": task.about, "classes": task.classes}).encode() + b"\n")
    for split in SPLITS:
        for array in task.splits[split]:
            np.save(out, array, allow_pickle=False)
    return out.getvalue()


def load_task(folder: Path, name: str) -> Task:
    """Read a task that :func:`save_task` wrote.

    Raises:
        ValueError: There is none of this name.
    """
    text, images = folder / f"{name}.jsonl.xz", folder / f"{name}.images.xz"
    if text.is_file():
        lines = lzma.decompress(text.read_bytes()).decode().splitlines()
        head = json.loads(lines[0])
        splits: dict[str, list[TextExample]] = {split: [] for split in SPLITS}
        for line in lines[1:]:
            split, prompt, choices, answer = json.loads(line)
            splits[split].append(TextExample(prompt, tuple(choices), answer))
        return TextTask(name, head["about"], head["per_byte"], splits)
    if images.is_file():
        file = io.BytesIO(lzma.decompress(images.read_bytes()))
        head = json.loads(file.readline())
        arrays = {
            split: (np.load(file, allow_pickle=False), np.load(file, allow_pickle=False))
            for split in SPLITS
        }
        return ImageTask(name, head["about"], tuple(head["classes"]), arrays)
    known: Sequence[str] = sorted(p.name.split(".")[0] for p in folder.glob("*.xz"))
    raise ValueError(f"task: expected one of {known} in {folder}, got {name!r}; `tasks` makes them")
