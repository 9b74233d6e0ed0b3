"""How rows of known data sets become examples.

HellaSwag, Winogrande and ARC rows become multiple choice with the same prompts that
lm-evaluation-harness builds, so that accuracies are comparable with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from prodial_kernels.training.data.examples import (
    Conversation,
    DataError,
    Example,
    Message,
    MultipleChoice,
    PromptCompletion,
    texts_of,
)
from prodial_kernels.training.data.findings import Findings

Row: TypeAlias = Mapping[str, Any]

BLANK = "left out, nothing but white space"
"""What happens to an example without text, as :class:`Findings` counts it."""


class Schema(NamedTuple):
    """One accepted kind of row: the keys that mark it, others that it reads, and its reader."""

    name: str
    required: tuple[str, ...]
    parse: Callable[[Row], Example]
    optional: tuple[str, ...] = ()


def parse_rows(rows: Iterable[tuple[str, Row]], findings: Findings | None = None) -> list[Example]:
    """Turn rows of one data set into examples; all rows must follow the same schema.

    Args:
        rows: Pairs of where the row is (for messages) and the row. Keys beyond the schema's own
            are ignored.
        findings: Told what is ignored or left out.

    Returns:
        One example per row, in order. Rows of the ``text`` schema that hold only white space are
        left out.

    Raises:
        DataError: A row that no schema, or more than one, fits; a second schema in the same data;
            a value of the wrong type; a label that is missing or out of range.
    """
    findings = Findings() if findings is None else findings
    examples: list[Example] = []
    first: tuple[str, Schema] | None = None
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where}: expected a JSON object with named values, got {type(row).__name__}; "
                'write it as one, such as {"text": "…"}'
            )
        schema = _detect(row, where)
        if first is None:
            first = (where, schema)
        elif schema is not first[1]:
            raise DataError(
                f"{where}: this row follows the schema '{schema.name}', but {first[0]} follows "
                f"'{first[1].name}'; keep each kind of row in a file of its own"
            )
        try:
            example = schema.parse(row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        for key in row:
            if key not in schema.required and key not in schema.optional:
                findings.count("ignored, not part of the schema", "value", detail=repr(key))
        if isinstance(example, str) and not example.strip():
            findings.count(BLANK, "row")
            continue
        if any("\0" in text for text in texts_of(example)):
            findings.count("kept, though it holds NUL characters", "row")
        examples.append(example)
    if first is not None and first[1].name == "Alpaca":
        findings.remark("instruction rows are put into Alpaca's prompt template")
    return examples


def _detect(row: Row, where: str) -> Schema:
    fitting = [schema for schema in SCHEMAS if all(key in row for key in schema.required)]
    if len(fitting) == 1:
        return fitting[0]
    # Alpaca's own data set also holds the whole in 'text', prompt, answer and all.
    alpaca = next((schema for schema in fitting if schema.name == "Alpaca"), None)
    if alpaca is not None and {schema.name for schema in fitting} == {"Alpaca", "text"}:
        return alpaca
    found = ", ".join(sorted(map(str, row))) or "none"
    if fitting:
        names = " and ".join(f"'{schema.name}'" for schema in fitting)
        raise DataError(
            f"{where}: the keys ({found}) fit the schemas {names}; remove the keys that are not "
            "meant"
        )
    partial = [
        (schema, missing)
        for schema in SCHEMAS
        if len(missing := set(schema.required) - set(row)) == 1 < len(schema.required)
    ]
    if len(partial) == 1:
        ((schema, (name,)),) = partial
        raise DataError(
            f"{where}: {name!r} is missing, which rows of the schema '{schema.name}' need beside "
            f"{', '.join(repr(key) for key in schema.required if key != name)}"
        )
    accepted = "".join(f"\n  {s.name}: {', '.join(s.required)}" for s in SCHEMAS)
    raise DataError(f"{where}: unknown keys ({found}). Rename them to those of a schema:{accepted}")


def _parse_multiple_choice(row: Row) -> Example:
    context = string(row, "context")
    choices = strings(row["choices"], "'choices'")
    # One space, as lm-evaluation-harness joins them, unless the data brings its own or there is
    # nothing to stand apart from.
    spaced = not context or context[-1].isspace() or any(c[:1].isspace() for c in choices)
    delimiter = "" if spaced else " "
    return MultipleChoice((context,) * len(choices), choices, label(row, "label"), delimiter)


def clean_hellaswag(text: str) -> str:
    """Remove WikiHow's mark-up the way lm-evaluation-harness does, step by step in its order."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _parse_hellaswag(row: Row) -> Example:
    if "ctx_a" in row and "ctx_b" in row:
        # The second half of the context begins the sentence that the endings complete.
        context = string(row, "ctx_a") + " " + string(row, "ctx_b").capitalize()
    elif "ctx" in row:
        context = string(row, "ctx")
    else:
        raise DataError("a HellaSwag row needs 'ctx', or 'ctx_a' and 'ctx_b'")
    if "activity_label" in row:
        context = string(row, "activity_label") + ": " + context
    endings = tuple(clean_hellaswag(ending) for ending in strings(row["endings"], "'endings'"))
    return MultipleChoice((clean_hellaswag(context),) * len(endings), endings, label(row, "label"))


def _parse_winogrande(row: Row) -> Example:
    before, blank, after = string(row, "sentence").partition("_")
    if not blank:
        raise DataError("'sentence' has no blank '_' to fill in")
    options = (string(row, "option1"), string(row, "option2"))
    answer = label(row, "answer")
    if answer not in (1, 2):
        raise DataError(f"'answer' must be '1' or '2', got {row['answer']!r:.60}")
    ending = after.strip()
    return MultipleChoice(
        tuple(before + option for option in options), (ending, ending), answer - 1
    )


def _parse_arc(row: Row) -> Example:
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise DataError("ARC 'choices' must be an object with the lists 'text' and 'label'")
    texts = strings(choices["text"], "'choices.text'")
    labels = strings(choices["label"], "'choices.label'")
    if len(texts) != len(labels):
        raise DataError(f"'choices' has {len(texts)} texts but {len(labels)} labels")
    answer = string(row, "answerKey")
    if answer not in labels:
        # Some rows count choices 1 to 5, others A to E; the key may use the other alphabet.
        answer = answer.translate(_LETTERS_TO_DIGITS if answer.isalpha() else _DIGITS_TO_LETTERS)
    if answer not in labels:
        raise DataError(
            f"'answerKey' {row['answerKey']!r:.60} is not among the labels {', '.join(labels)}"
        )
    context = f"Question: {string(row, 'question')}\nAnswer:"
    return MultipleChoice((context,) * len(texts), texts, labels.index(answer))


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


def _parse_alpaca(row: Row) -> Example:
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


def _parse_messages(row: Row) -> Example:
    """Make a conversation of ``messages``: objects with ``role`` and ``content``."""
    return Conversation(
        tuple(
            Message(*(as_string(turn[key], f"{where}.{key}") for key in ("role", "content")))
            for turn, where in _turns(row, "messages", ("role", "content"))
        )
    )


def _parse_sharegpt(row: Row) -> Example:
    """Make a conversation of ``conversations``: objects with ``from`` and ``value``."""
    messages = []
    for turn, where in _turns(row, "conversations", ("from", "value")):
        role, text = (as_string(turn[key], f"{where}.{key}") for key in ("from", "value"))
        messages.append(Message(_SHAREGPT_ROLES.get(role, role), text))
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


# --- Values of a row: checked one by one, and named where they are wrong. -------------------------


def string(row: Row, key: str) -> str:
    """Return a value that must be text; DataError for anything else."""
    return as_string(row[key], f"'{key}'")


def as_string(value: Any, what: str) -> str:
    """Return a text, which ``what`` names in the error; DataError for anything else."""
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid Unicode: {error.reason}") from None
    return value


def strings(value: Any, what: str) -> tuple[str, ...]:
    """Return texts that must come in a list; DataError for anything else."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise DataError(f"{what} must be a list of strings, got {type(value).__name__}")
    return tuple(as_string(item, f"{what}[{index}]") for index, item in enumerate(value))


def label(row: Row, key: str) -> int:
    """Return a whole number, written as one or as digits; DataError for anything else."""
    value = row[key]
    # No label has as many digits as Python refuses to read.
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value in ("", None):
        raise DataError(f"'{key}' is empty: test splits often come without labels; use another")
    raise DataError(f"'{key}' must be a whole number, got {value!r:.60}")


_LETTERS_TO_DIGITS = str.maketrans("ABCDE", "12345")
_DIGITS_TO_LETTERS = str.maketrans("12345", "ABCDE")

SCHEMAS = (
    Schema("text", ("text",), lambda row: string(row, "text")),
    Schema(
        "prompt/completion", ("prompt", "completion"),
        lambda row: PromptCompletion(string(row, "prompt"), string(row, "completion")),
    ),
    Schema("multiple choice", ("context", "choices", "label"), _parse_multiple_choice),
    Schema("Alpaca", ("instruction", "output"), _parse_alpaca, ("input",)),
    Schema("messages", ("messages",), _parse_messages),
    Schema("ShareGPT", ("conversations",), _parse_sharegpt),
    Schema(
        "HellaSwag", ("endings", "label"), _parse_hellaswag,
        ("ctx", "ctx_a", "ctx_b", "activity_label"),
    ),
    Schema("Winogrande", ("sentence", "option1", "option2", "answer"), _parse_winogrande),
    Schema("ARC", ("question", "choices", "answerKey"), _parse_arc),
)  # fmt: skip
KEYS = frozenset(key for schema in SCHEMAS for key in (*schema.required, *schema.optional))
"""What values of any kind of row are called."""
