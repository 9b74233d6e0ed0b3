"""Rows of instructions and of conversations, in the forms that most data sets have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prodial_kernels.training.data.examples import (
    Conversation,
    DataError,
    Example,
    Message,
    PromptCompletion,
)
from prodial_kernels.training.data.row_values import Row, as_string, string

# The templates of Stanford Alpaca, which most data sets in this form were written for.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def parse_alpaca(row: Row) -> Example:
    """Make a prompt of an instruction and its input, if it has one; the output completes it."""
    instruction, output = string(row, "instruction"), string(row, "output")
    if not output:
        raise DataError("'output' is empty: it needs at least one character")
    # Tables without an input in some rows hold nothing there.
    given = string(row, "input") if row.get("input") is not None else ""
    template = _ALPACA_WITH_INPUT if given else _ALPACA
    # Not str.format: the texts may hold braces, and one must not be looked for in another.
    before, after = template.split("{instruction}")
    return PromptCompletion(before + instruction + after.replace("{input}", given), output)


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def parse_messages(row: Row) -> Example:
    """Make a conversation of ``messages``: objects with ``role`` and ``content``."""
    return Conversation(
        tuple(
            Message(as_string(turn["role"], f"{where}.role"), _content(turn, "content", where))
            for turn, where in _turns(row, "messages", ("role", "content"))
        )
    )


def parse_sharegpt(row: Row) -> Example:
    """Make a conversation of ``conversations``: objects with ``from`` and ``value``."""
    messages = []
    for turn, where in _turns(row, "conversations", ("from", "value")):
        role = as_string(turn["from"], f"{where}.from")
        messages.append(Message(_SHAREGPT_ROLES.get(role, role), _content(turn, "value", where)))
    return Conversation(tuple(messages))


def _turns(row: Row, key: str, wanted: tuple[str, str]) -> Iterator[tuple[Row, str]]:
    turns = row[key]
    if isinstance(turns, str) or not isinstance(turns, (list, tuple)):
        raise DataError(f"'{key}' must be a list of messages, got {type(turns).__name__}")
    for index, turn in enumerate(turns):
        where = f"'{key}'[{index}]"
        if not isinstance(turn, Mapping) or not set(wanted) <= set(turn):
            raise DataError(
                f"{where} must be an object with '{wanted[0]}' and '{wanted[1]}', got {turn!r:.60}"
            )
        others = {k for k, value in turn.items() if k not in wanted and value not in (None, [], "")}
        if others:
            raise DataError(
                f"{where} has {', '.join(sorted(map(str, others)))}; only text messages are read, "
                "no tool calls and no images"
            )
        yield turn, where


def _content(turn: Row, key: str, where: str) -> str:
    return as_string(turn[key], f"{where}.{key}")
