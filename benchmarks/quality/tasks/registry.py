"""The tasks by name, and what makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.tasks.debian import make_german, make_section
from benchmarks.quality.tasks.glyphs import make_letters, make_scripts, make_style
from benchmarks.quality.tasks.icons import make_icons
from benchmarks.quality.tasks.signatures import make_signature
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.wordnet import make_meaning, make_word

__all__ = ["LANGUAGE", "MAKERS", "VISION"]

LANGUAGE = ("meaning", "word", "section", "german", "signature")
VISION = ("scripts", "style", "icons")

MAKERS: dict[str, Callable[[str, Path], Task]] = {
    "meaning": make_meaning,
    "word": make_word,
    "section": make_section,
    "german": make_german,
    "signature": make_signature,
    "scripts": make_scripts,
    "style": make_style,
    "icons": make_icons,
    # Not a task: what the vision base is pretrained on.
    "letters": make_letters,
}
