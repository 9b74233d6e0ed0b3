"""A task from Python's standard library: the arguments of a function, among four."""

from __future__ import annotations

import importlib
import inspect
import platform
import sys
import warnings
from collections import defaultdict
from pathlib import Path

from benchmarks.quality.tasks.task import CAPS, TextExample, TextTask, capped, number_of

__all__ = ["make_signature"]

_CHOICES = 4
# Importing these shows something, or they are private to CPython's own tests.
_LEFT_OUT = {"antigravity", "this", "idlelib", "turtledemo", "test", "lib2to3", "tkinter"}


def _functions() -> dict[str, list[tuple[str, str, str]]]:
    """Of each public module: (dotted name, first line of the docstring, arguments)."""
    found: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _LEFT_OUT:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except ImportError:  # of another platform
            continue
        for owner_name, owner in [("", module), *sorted(vars(module).items())]:
            if owner_name and not (
                inspect.isclass(owner) and getattr(owner, "__module__", "") == name
            ):
                continue
            for key, value in sorted(vars(owner).items()):
                if key.startswith("_") or not callable(value) or inspect.isclass(value):
                    continue
                if getattr(value, "__module__", name) not in (name, None):
                    continue
                dotted = ".".join(part for part in (name, owner_name, key) if part)
                try:
                    arguments = str(inspect.signature(value))
                except (TypeError, ValueError):
                    continue
                arguments = arguments.partition(" -> ")[0].removeprefix("(").removesuffix(")")
                lines = (inspect.getdoc(value) or "").strip().splitlines()
                # A docstring that spells the arguments out gives the answer away; so does an
                # address in a default.
                if not lines or "(" in lines[0] or " at 0x" in arguments:
                    continue
                if 4 <= len(arguments) <= 90 and arguments not in ("self", "self, /"):
                    found[name].append((dotted, lines[0][:120], arguments))
    return found


def make_signature(name: str, work: Path, caps: dict[str, int] = CAPS) -> TextTask:
    """A function's name and summary -> its arguments, among four of the same module or near it."""
    del work  # nothing is downloaded
    functions = _functions()
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
