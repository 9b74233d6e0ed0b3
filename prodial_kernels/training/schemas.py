"""What one training or evaluation example is, and how rows of known data sets become one.

Three kinds of example exist: a plain document (``str``), :class:`PromptCompletion` and
:class:`MultipleChoice`. HellaSwag, Winogrande and ARC rows become multiple choice with the same
prompts that lm-evaluation-harness builds, so that accuracies are comparable with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias


class DataError(ValueError):
    """Data cannot be used; the message says where, what was found, and what to do."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and the text to learn after it, joined exactly as written.

    Attributes:
        prompt: Text that is read; may be empty.
        completion: Text that is trained on and scored; never empty.

    Raises:
        DataError: The completion is empty.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        """Refuse what has nothing to learn."""
        if not self.completion:
            raise DataError("'completion' is empty: it needs at least one character")


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """One question: choice ``i`` is scored as ``delimiter + choices[i]`` after ``contexts[i]``.

    Each choice has a context of its own because Winogrande puts the options into the context and
    scores the same ending after each. Elsewhere all contexts are equal.

    Attributes:
        contexts: Text before each choice.
        choices: The continuations, without the delimiter: their lengths normalise ``acc_norm``.
        label: Index of the right choice.
        delimiter: What stands between a context and its choice.

    Raises:
        DataError: Fewer than two choices, unequal counts, a label out of range, or nothing to
            score in a choice.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    label: int
    delimiter: str = " "

    def __post_init__(self) -> None:
        """Check the counts, the label, and that each choice has text to score."""
        if len(self.choices) < 2:
            raise DataError(f"multiple choice needs at least 2 choices, got {len(self.choices)}")
        if len(self.contexts) != len(self.choices):
            raise DataError(
                f"multiple choice needs one context for each choice, got {len(self.contexts)} "
                f"contexts for {len(self.choices)} choices"
            )
        if not 0 <= self.label < len(self.choices):
            raise DataError(
                f"label {self.label} is out of range: there are {len(self.choices)} choices, so it "
                f"must be 0 to {len(self.choices) - 1}"
            )
        for index, choice in enumerate(self.choices):
            if not self.delimiter + choice:
                raise DataError(f"choice {index} is empty: there is nothing to score")

    def pair(self, index: int) -> tuple[str, str]:
        """Return the context and the continuation that is scored for one choice."""
        return self.contexts[index], self.delimiter + self.choices[index]


Example: TypeAlias = str | PromptCompletion | MultipleChoice
Kind: TypeAlias = Literal["text", "prompt/completion", "multiple choice"]
Row: TypeAlias = Mapping[str, Any]


def kind_of(examples: Sequence[Example]) -> Kind:
    """Say what all examples are.

    Raises:
        DataError: There are none, or they are of more than one kind.
        TypeError: One is no example.
    """
    kinds: dict[type, Kind] = {
        str: "text",
        PromptCompletion: "prompt/completion",
        MultipleChoice: "multiple choice",
    }
    types = {type(example) for example in examples}
    if foreign := types - set(kinds):
        raise TypeError(
            "examples must be str, PromptCompletion or MultipleChoice, got "
            + ", ".join(sorted(t.__name__ for t in foreign))
        )
    if not types:
        raise DataError("there are no examples")
    if len(types) > 1:
        raise DataError(
            f"examples must be of one kind, got {', '.join(sorted(kinds[t] for t in types))}"
        )
    return kinds[types.pop()]


def text_bytes(example: Example) -> int:
    """Return the size of an example's text in UTF-8 bytes (each choice counted once)."""
    if isinstance(example, str):
        return len(example.encode())
    if isinstance(example, PromptCompletion):
        return len(example.prompt.encode()) + len(example.completion.encode())
    texts = {*example.contexts, *example.choices}
    return sum(len(text.encode()) for text in texts)


class Schema(NamedTuple):
    """One accepted kind of row: the keys that mark it, and what makes an example of it."""

    name: str
    required: tuple[str, ...]
    parse: Callable[[Row], Example]


def parse_rows(rows: Iterable[tuple[str, Row]]) -> list[Example]:
    """Turn rows of one data set into examples; all rows must follow the same schema.

    Args:
        rows: Pairs of where the row is (for messages) and the row. Keys beyond the schema's own
            are ignored.

    Returns:
        One example per row, in order. Rows of the ``text`` schema that hold only white space are
        left out.

    Raises:
        DataError: A row that no schema, or more than one, fits; a second schema in the same data;
            a value of the wrong type; a label that is missing or out of range.
    """
    examples: list[Example] = []
    first: tuple[str, Schema] | None = None
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
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
        if not isinstance(example, str) or example.strip():
            examples.append(example)
    return examples


def _detect(row: Row, where: str) -> Schema:
    fitting = [schema for schema in SCHEMAS if all(key in row for key in schema.required)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(sorted(map(str, row))) or "none"
    if fitting:
        names = " and ".join(f"'{schema.name}'" for schema in fitting)
        raise DataError(
            f"{where}: the keys ({found}) fit the schemas {names}; remove the keys that are not "
            "meant"
        )
    accepted = "".join(f"\n  {s.name}: {', '.join(s.required)}" for s in SCHEMAS)
    raise DataError(f"{where}: unknown keys ({found}). Accepted schemas and their keys:{accepted}")


def _string(row: Row, key: str) -> str:
    return _as_string(row[key], f"'{key}'")


def _as_string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid Unicode: {error.reason}") from None
    return value


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise DataError(f"{what} must be a list of strings, got {type(value).__name__}")
    return tuple(_as_string(item, f"{what}[{index}]") for index, item in enumerate(value))


def _label(row: Row, key: str) -> int:
    value = row[key]
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value in ("", None):
        raise DataError(f"'{key}' is empty: test splits often come without labels; use another")
    raise DataError(f"'{key}' must be a whole number, got {value!r:.60}")


def _parse_text(row: Row) -> Example:
    return _string(row, "text")


def _parse_prompt_completion(row: Row) -> Example:
    return PromptCompletion(_string(row, "prompt"), _string(row, "completion"))


def _parse_multiple_choice(row: Row) -> Example:
    context = _string(row, "context")
    choices = _strings(row["choices"], "'choices'")
    # One space, as lm-evaluation-harness joins them, unless the data brings its own or there is
    # nothing to stand apart from.
    spaced = not context or context[-1].isspace() or any(c[:1].isspace() for c in choices)
    delimiter = "" if spaced else " "
    return MultipleChoice((context,) * len(choices), choices, _label(row, "label"), delimiter)


def clean_hellaswag(text: str) -> str:
    """Remove WikiHow's mark-up the way lm-evaluation-harness does, step by step in its order."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _parse_hellaswag(row: Row) -> Example:
    if "ctx_a" in row and "ctx_b" in row:
        # The second half of the context begins the sentence that the endings complete.
        context = _string(row, "ctx_a") + " " + _string(row, "ctx_b").capitalize()
    elif "ctx" in row:
        context = _string(row, "ctx")
    else:
        raise DataError("a HellaSwag row needs 'ctx', or 'ctx_a' and 'ctx_b'")
    if "activity_label" in row:
        context = _string(row, "activity_label") + ": " + context
    endings = tuple(clean_hellaswag(ending) for ending in _strings(row["endings"], "'endings'"))
    return MultipleChoice((clean_hellaswag(context),) * len(endings), endings, _label(row, "label"))


def _parse_winogrande(row: Row) -> Example:
    before, blank, after = _string(row, "sentence").partition("_")
    if not blank:
        raise DataError("'sentence' has no blank '_' to fill in")
    options = (_string(row, "option1"), _string(row, "option2"))
    answer = _label(row, "answer")
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
    texts = _strings(choices["text"], "'choices.text'")
    labels = _strings(choices["label"], "'choices.label'")
    if len(texts) != len(labels):
        raise DataError(f"'choices' has {len(texts)} texts but {len(labels)} labels")
    answer = _string(row, "answerKey")
    if answer not in labels:
        # Some rows count choices 1 to 5, others A to E; the key may use the other alphabet.
        answer = answer.translate(_LETTERS_TO_DIGITS if answer.isalpha() else _DIGITS_TO_LETTERS)
    if answer not in labels:
        raise DataError(
            f"'answerKey' {row['answerKey']!r:.60} is not among the labels {', '.join(labels)}"
        )
    context = f"Question: {_string(row, 'question')}\nAnswer:"
    return MultipleChoice((context,) * len(texts), texts, labels.index(answer))


_LETTERS_TO_DIGITS = str.maketrans("ABCDE", "12345")
_DIGITS_TO_LETTERS = str.maketrans("12345", "ABCDE")

SCHEMAS = (
    Schema("text", ("text",), _parse_text),
    Schema("prompt/completion", ("prompt", "completion"), _parse_prompt_completion),
    Schema("multiple choice", ("context", "choices", "label"), _parse_multiple_choice),
    Schema("HellaSwag", ("endings", "label"), _parse_hellaswag),
    Schema("Winogrande", ("sentence", "option1", "option2", "answer"), _parse_winogrande),
    Schema("ARC", ("question", "choices", "answerKey"), _parse_arc),
)
