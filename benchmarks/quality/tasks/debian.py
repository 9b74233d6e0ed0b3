"""Two tasks from Debian's package descriptions: the section, and the German translation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality.tasks.task import CAPS, TextExample, TextTask, capped, number_of

__all__ = ["make_german", "make_section"]

_SECTIONS = (
    "admin", "doc", "fonts", "games", "graphics", "mail", "math", "net", "science", "sound",
    "utils", "web",
)  # fmt: skip
_CHOICES = 4


def _lists(work: Path) -> Path:
    """Fetch Debian's lists with English and German descriptions into ``work``."""
    lists = work / "lists"
    if not any(lists.glob("*Translation-de*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-o", f"Dir::State::lists={lists}", "-o", "Acquire::Languages=en,de"]
        subprocess.run(["apt-get", "-q", *options, "update"], check=True)
    return lists


def _stanzas(lists: Path, ending: str) -> Iterator[dict[str, str]]:
    """Yield the stanzas of every list of a name; a continued field keeps its lines."""
    for path in sorted(lists.glob(f"*{ending}*")):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
        text = subprocess.run(command, check=True, capture_output=True).stdout.decode()
        for stanza in text.split("\n\n"):
            fields: dict[str, str] = {}
            name = ""
            for line in stanza.splitlines():
                if line.startswith(" "):
                    fields[name] += "\n" + line[1:]
                else:
                    name, _, value = line.partition(": ")
                    fields[name] = value
            if "Package" in fields:
                yield fields


def _about(what: str) -> dict[str, object]:
    return {
        "what": what,
        "sources": [
            {
                "package": "Debian 12's package lists (main, amd64)",
                "version": "bookworm",
                "licence": "those of the packages; descriptions as distributed by Debian",
            }
        ],
    }


def make_section(name: str, work: Path, caps: dict[str, int] = CAPS) -> TextTask:
    """A package's description -> its section, one of twelve."""
    lists = _lists(work)
    sections = {
        s["Package"]: s.get("Section", "").split("/")[-1] for s in _stanzas(lists, "_Packages")
    }
    choices = tuple(f" {section}" for section in _SECTIONS)
    keyed, seen = [], set()
    for stanza in _stanzas(lists, "_Translation-en"):
        section = sections.get(stanza["Package"])
        text = stanza.get("Description-en", "")
        short, _, long = text.partition("\n")
        first = " ".join(long.split("\n.\n")[0].split())[:240]
        if section not in _SECTIONS or len(first) < 60 or first in seen:
            continue
        seen.add(first)
        prompt = f"Description: {short}. {first}\nSection:"
        example = TextExample(prompt, choices, _SECTIONS.index(section))
        # Packages of one source share sentences: they stay in one split.
        keyed.append((re.split(r"[-0-9]", stanza["Package"])[0], example))
    return TextTask(name, _about("section of a package, of twelve"), False, capped(keyed, caps))


def make_german(name: str, work: Path, caps: dict[str, int] = CAPS) -> TextTask:
    """A short description in English -> the same in German, among four."""
    lists = _lists(work)
    german = {
        s["Description-md5"]: s["Description-de"].split("\n")[0]
        for s in _stanzas(lists, "_Translation-de")
        if "Description-de" in s
    }
    pairs, seen = [], set()
    for stanza in _stanzas(lists, "_Translation-en"):
        text = german.get(stanza.get("Description-md5", ""))
        short = stanza.get("Description-en", "").split("\n")[0]
        if text is None or text == short or not 15 <= len(text) <= 90 or short in seen:
            continue
        seen.add(short)
        pairs.append((re.split(r"[-0-9]", stanza["Package"])[0], short, text))
    pairs.sort()
    keyed = []
    for i, (key, short, text) in enumerate(pairs):
        found = [text]
        for attempt in range(60):
            # From near it in the alphabet, where the packages are of one kind.
            j = (i + number_of(f"{short}/{attempt}", 41) - 20) % len(pairs)
            if pairs[j][2] not in found:
                found.append(pairs[j][2])
            if len(found) == _CHOICES:
                break
        if len(found) < _CHOICES:
            continue
        place = number_of(f"place/{short}", _CHOICES)
        found[0], found[place] = found[place], found[0]
        choices = tuple(f" {choice}" for choice in found)
        keyed.append((key, TextExample(f"English: {short}\nDeutsch:", choices, place)))
    return TextTask(name, _about("German translation, among four"), True, capped(keyed, caps))
