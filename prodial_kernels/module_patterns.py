"""Matching module paths by name or regular expression, without catastrophic backtracking.

Python's ``re`` tries every way to match: ``(a+)+b`` fails in 2^n ways on n letters, and cannot be
interrupted. An adapter's file, which may come from anybody, names ``target_modules``; so an
expression is only run if the number of its ways to match is bounded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

# Letters of a module path that an unbounded repetition may take: longer than paths are.
_LONGEST = 100
# Four unbounded repetitions in a row: a few million steps for a path.
_MOST_WAYS = (_LONGEST + 1) ** 4


def matches_name(path: str, name: str) -> bool:
    """Whether a dotted path is ``name`` or ends with ``.name``."""
    return path == name or path.endswith(f".{name}")


def is_plain_name(text: str) -> bool:
    """Whether ``text`` is one name, not a regular expression for whole paths."""
    return text.isidentifier() or text.isdigit()


def compile_pattern(pattern: str, argument: str) -> re.Pattern[str]:
    """Compile a regular expression that ends on every path; messages call it ``argument``.

    Raises:
        ValueError: It is no regular expression, or could try more ways than are tried in a moment.
    """
    try:
        with warnings.catch_warnings():
            # Of expressions that a later Python will read otherwise.
            warnings.simplefilter("error", FutureWarning)
            compiled = re.compile(pattern)
            ways = _ways(_parsed(pattern))
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{argument}={pattern!r} is not a regular expression: {reason}") from error
    if ways > _MOST_WAYS:
        raise ValueError(
            f"{argument}={pattern!r} may take for ever: a repetition within a repetition, or more "
            "than four unbounded ones, match in too many ways; name the modules in a list, or "
            r"write an expression such as '.*\.(in|out)_proj'"
        )
    return compiled


def _parsed(pattern: str) -> Any:
    try:
        from re import _parser  # type: ignore[attr-defined]  # Python 3.11 on
    except ImportError:
        import sre_parse as _parser
    return _parser.parse(pattern)


def _ways(items: Iterable[tuple[Any, Any]]) -> int:
    """An upper bound of the ways in which a parsed sequence matches a path, cut off when large."""
    ways = 1
    for operation, argument in items:
        ways *= _ways_of(str(operation), argument)
        if ways > _MOST_WAYS:
            return ways
    return ways


def _ways_of(operation: str, argument: Any) -> int:
    if operation.endswith("_REPEAT"):
        least, most, body = argument
        most = min(int(most), max(int(least), _LONGEST))
        once = _ways(body)
        return (most - int(least) + 1) * (once ** min(most, _LONGEST) if once > 1 else 1)
    if operation == "BRANCH":
        return sum(_ways(branch) for branch in argument[1])
    ways = 1
    # Groups, assertions and conditions hold their sequences among other arguments.
    for part in argument if isinstance(argument, tuple | list) else (argument,):
        if hasattr(part, "getwidth"):
            ways *= _ways(part)
    return ways
