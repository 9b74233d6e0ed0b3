"""Functions of Python's standard library with their summaries and arguments, printed as JSON.

Run alone, by path and with ``-I -S``: what other packages load or change must not be seen.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from collections import defaultdict

# Importing these shows something, or they are CPython's own tests and tools.
_LEFT_OUT = {"antigravity", "this", "idlelib", "turtledemo", "test", "lib2to3", "tkinter"}


def functions() -> dict[str, list[tuple[str, str, str]]]:
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
                row = _row(".".join(part for part in (name, owner_name, key) if part), value)
                if row is not None:
                    found[name].append(row)
    return found


def _row(dotted: str, value: object) -> tuple[str, str, str] | None:
    try:
        arguments = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    arguments = arguments.partition(" -> ")[0].removeprefix("(").removesuffix(")")
    lines = (inspect.getdoc(value) or "").strip().splitlines()
    # A docstring that spells the arguments out gives the answer away; an address in a default
    # changes from run to run.
    if not lines or "(" in lines[0] or " at 0x" in arguments:
        return None
    if 4 <= len(arguments) <= 90 and arguments not in ("self", "self, /"):
        return dotted, lines[0][:120], arguments
    return None


if __name__ == "__main__":
    print(json.dumps(functions()))
