"""Two tasks from WordNet's glosses: the meaning of a word, and the word of a meaning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.packages import package_version, unpacked
from benchmarks.quality.tasks.task import CAPS, TextExample, TextTask, capped, digest, number_of

__all__ = ["make_meaning", "make_word"]

PACKAGE = "wordnet-base"
_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_CHOICES = 4


@dataclass(frozen=True)
class _Sense:
    word: str
    part: str
    field: str  # WordNet's lexicographer file: food, animal, motion, …
    gloss: str


def _senses(work: Path) -> Iterator[_Sense]:
    """Yield every synset by its first word and its gloss without examples."""
    folder = unpacked([PACKAGE], work)[PACKAGE]
    for ending, part in _PARTS.items():
        path = next(folder.rglob(f"data.{ending}"))
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):
                continue
            data, _, text = line.partition("|")
            columns = data.split()
            word = columns[4].split("(")[0].replace("_", " ")
            gloss = text.split(";")[0].strip()
            if 12 <= len(gloss) <= 110 and word.lower() not in gloss.lower() and '"' not in gloss:
                yield _Sense(word, part, columns[1], gloss)


def _choices(senses: list[_Sense], i: int, wanted: str) -> tuple[tuple[str, ...], int]:
    """The right one among three of neighbouring meanings, at a place that a hash decides."""
    right = getattr(senses[i], wanted)
    found = [right]
    for attempt in range(60):
        other = senses[number_of(f"{senses[i].word}/{senses[i].gloss}/{attempt}", len(senses))]
        if getattr(other, wanted) not in found and other.word != senses[i].word:
            found.append(getattr(other, wanted))
        if len(found) == _CHOICES:
            break
    place = number_of(f"place/{senses[i].gloss}", len(found))
    found[0], found[place] = found[place], found[0]
    return tuple(f" {text}" for text in found), place


def _make(name: str, work: Path, wanted: str, caps: dict[str, int]) -> TextTask:
    groups: dict[tuple[str, str], list[_Sense]] = defaultdict(list)
    for sense in _senses(work):
        groups[sense.part, sense.field].append(sense)
    keyed = []
    for (part, _), senses in sorted(groups.items()):
        if len(senses) < 40:
            continue
        for i, sense in enumerate(senses):
            # Each sense is in one of the two tasks.
            if (digest(f"task/{sense.word}") % 2 == 0) != (wanted == "gloss"):
                continue
            if wanted == "gloss":
                prompt = f"Word: {sense.word} ({part})\nMeaning:"
            else:
                prompt = f"Meaning: {sense.gloss} ({part})\nWord:"
            choices, answer = _choices(senses, i, wanted)
            if len(choices) == _CHOICES:
                keyed.append((sense.word, TextExample(prompt, choices, answer)))
    about = {
        "what": f"the right {'meaning of a word' if wanted == 'gloss' else 'word of a meaning'} "
        "among four of the same part of speech and field",
        "sources": [
            {
                "package": PACKAGE,
                "version": package_version(PACKAGE, work),
                "licence": "LicenseRef-WordNet-3.0",
            }
        ],
    }
    return TextTask(name, about, True, capped(keyed, caps))


def make_meaning(name: str, work: Path, caps: dict[str, int] = CAPS) -> TextTask:
    """Word -> meaning."""
    return _make(name, work, "gloss", caps)


def make_word(name: str, work: Path, caps: dict[str, int] = CAPS) -> TextTask:
    """Meaning -> word."""
    return _make(name, work, "word", caps)
