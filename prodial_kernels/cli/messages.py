"""Error messages of the command line: in terms of flags, with the fix."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from prodial_kernels._checks import did_you_mean, option_meant
from prodial_kernels.training.config import OPTIONS, ConfigError
from prodial_kernels.upstream import MissingExtraError

# With those that only 'prodial evaluate' and 'prodial generate' have.
_OPTIONS = (*OPTIONS, "max_tokens", "num_fewshot", "max_new_tokens", "top_p")
# Arguments of functions that are no options of a configuration.
_ARGUMENTS = {"resume": "--resume", "replace": "--force"}
_OWN_OR_BUILTIN = ("builtins", "prodial_kernels")


def explained(error: Exception) -> str:
    """Return an error's message; an error that is not raised on purpose is named by its class."""
    expected = (ValueError, RuntimeError, OSError, MissingExtraError)
    if isinstance(error, ConfigError):
        return error.renamed(flag_of)
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{in_flags(error.strerror)}{place}"
    message = str(error) or "no message"
    if isinstance(error, expected) and type(error).__module__.split(".")[0] in _OWN_OR_BUILTIN:
        return in_flags(message)
    return f"{type(error).__name__}: {message} ('--debug' shows where)"


def flag_of(option: str) -> str:
    """Return the flag that sets an option."""
    return OPTIONS[option].flags[0] if option in OPTIONS else "--" + option.replace("_", "-")


def in_flags(message: str) -> str:
    """Replace the names of options by flags in a message that was written for Python.

    Names with an underscore mean nothing else, unless they are part of a path or of code; names
    without one are English words too, so only those are replaced that begin a message about them.
    """
    # "resume=True" and "output=..." are the flag alone: whatever its name, nothing else looks so.
    message = re.sub(
        rf"(?<![\w./\\'\"])({'|'.join((*_OPTIONS, *_ARGUMENTS))})=(?:True\b|\.\.\.)",
        lambda m: _ARGUMENTS.get(m.group(1)) or flag_of(m.group(1)),
        message,
    )
    told = "|".join(name for name in _OPTIONS if "_" in name)
    # "target_modules='x'" is the flag and its value, unless it is an argument of a call.
    message = re.sub(
        rf"(?<![\w./\\'\"=(-])({told})=(?=['\"([])", lambda m: f"{flag_of(m.group(1))} ", message
    )
    # "n_blocks=8" is the flag and its value.
    message = re.sub(
        rf"(?<![\w./\\'\"=-])({told})(?:=(\w+))?(?![\w/\\'\"=([])",
        lambda m: flag_of(m.group(1)) + (f" {m.group(2)}" if m.group(2) else ""),
        message,
    )
    return re.sub(
        rf"^({'|'.join(_OPTIONS)})(?= (?:must|is|=|\d))", lambda m: flag_of(m.group(1)), message
    )


def joined_numbers(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Join negative numbers to the flag before them: argparse would take them for flags."""
    actions = _actions(parser)
    out: list[str] = []
    for word in words:
        before = actions.get(out[-1]) if out else None
        if re.match(r"-[\d.]", word) and before is not None and before.nargs is None:
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def unknown_flag(
    parsers: Mapping[str, argparse.ArgumentParser], command: str, words: Sequence[str]
) -> str | None:
    """Return what is wrong with the first flag that a command does not have; None without one."""
    known = _actions(parsers[command])
    for word in words:
        if word == "--":
            return None
        flag = word.split("=", 1)[0]
        if not re.match(r"--?[A-Za-z]", flag) or flag in known:
            continue
        others = [name for name, parser in parsers.items() if flag in _actions(parser)]
        if others:
            where = " and ".join(f"'prodial {name}'" for name in others)
            where += " has" if len(others) == 1 else " have"
            return f"unknown option {flag}: 'prodial {command}' has none of that name, {where}"
        by_name = {name.lstrip("-").replace("-", "_"): name for name in known}
        meant = option_meant(flag.lstrip("-"), by_name)
        hint = f"; did you mean {by_name[meant]}?" if meant is not None else ""
        return f"unknown option {flag}{hint}"
    return None


def repeated(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """Return what is wrong with a flag given twice, where the first values would be lost.

    A later number or choice stands for an earlier one, as everywhere. But who gives data twice, or
    names under two flags, means both.
    """
    known = _actions(parser)
    flags = [word.split("=", 1)[0] for word in words if word.startswith("--")]
    for flag in dict.fromkeys(flags):
        action = known.get(flag)
        if action is None or flags.count(flag) == 1:
            continue
        if action.nargs == "+":
            return f"{flag} is given {flags.count(flag)} times: give everything after one {flag}"
        if action.dest == "data":
            return (
                f"{flag} is given {flags.count(flag)} times, and takes one: put the files into a "
                "directory, or into one file"
            )
    return None


def unexpected(words: Sequence[str], given: Sequence[str]) -> str:
    """Return what to say of words that belong to no flag."""
    first = words[0]
    place = given.index(first) if first in given else 0
    if place >= 2 and given[place - 2] == "--memory-budget":
        size = f"{given[place - 1]}{first}"
        return f"--memory-budget takes one word: write {size}, or '{given[place - 1]} {first}'"
    shown = " ".join(words)
    path = Path(first).expanduser()
    # Unlike the method of paths this takes any text.
    if not os.path.exists(path):
        return f"unexpected {shown!r}: everything is given by name, such as --data {first}"
    if (path / "adapter_config.json").is_file():
        return f"unexpected {shown!r}; did you mean --adapter {first}?"
    flag = "--model" if (path / "config.json").is_file() else "--data"
    return f"unexpected {shown!r}; did you mean {flag} {first}?"


def with_suggestion(message: str) -> str:
    """Add to argparse's message about a wrong choice the one that may be meant."""
    match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if match is None:
        return message
    choices = [choice.strip(" '\"") for choice in match.group(2).split(",")]
    if match.group(1) == "gpu" and "cuda" in choices:
        return f"{message}; did you mean 'cuda'?"
    return message + did_you_mean(match.group(1), choices)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}
