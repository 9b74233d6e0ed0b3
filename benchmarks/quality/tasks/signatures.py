"""A task from Python's standard library: the arguments of a function, among four."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.quality.tasks.task import CAPS, TextExample, TextTask, capped, number_of

__all__ = ["make_signature"]

_CHOICES = 4
_LIST = Path(__file__).with_name("standard_library.py")


def make_signature(name: str, work: Path, caps: dict[str, int] = CAPS) -> TextTask:
    """A function's name and summary -> its arguments, among four of the same module or near it."""
    del work  # nothing is downloaded
    command = [sys.executable, "-I", "-S", str(_LIST)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[tuple[str, str, str]]] = json.loads(listed)
    everything = [row for rows in functions.values() for row in rows]
    keyed = []
    for module, rows in functions.items():
        for dotted, summary, arguments in rows:
            found = [arguments]
            for attempt in range(80):
                # The first half of the tries stays within the module.
                pool = rows if attempt < 40 else everything
                other = pool[number_of(f"{dotted}/{attempt}", len(pool))][2]
                if other not in found:
                    found.append(other)
                if len(found) == _CHOICES:
                    break
            place = number_of(f"place/{dotted}", len(found))
            found[0], found[place] = found[place], found[0]
            prompt = f"# {summary}\n{dotted}("
            choices = tuple(f"{text})" for text in found)
            keyed.append((f"{module}/{dotted}", TextExample(prompt, choices, place)))
    about = {
        "what": "arguments of a function of the standard library, among four",
        "sources": [
            {
                "package": "Python's standard library",
                "version": platform.python_version(),
                "licence": "PSF-2.0",
            }
        ],
    }
    return TextTask(name, about, True, capped(keyed, caps))
