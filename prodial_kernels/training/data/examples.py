"""What one training or evaluation example is.

Four kinds exist: a plain document (``str``), :class:`PromptCompletion`, :class:`Conversation` and
:class:`MultipleChoice`. Rows of data sets become examples in ``schemas.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias


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


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; the tokenizer's chat template makes text of them (see ``chat.py``).

    Attributes:
        messages: The turns; every one of the assistant's is trained on and scored.

    Raises:
        DataError: No turn is the assistant's.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        """Refuse what has nothing to learn."""
        roles = [message.role for message in self.messages]
        if "assistant" not in roles:
            raise DataError(
                f"no message has the role 'assistant', so there is nothing to learn; got {roles}"
            )


Example: TypeAlias = str | PromptCompletion | Conversation | MultipleChoice
Kind: TypeAlias = Literal["text", "prompt/completion", "conversation", "multiple choice"]


def kind_of(examples: Sequence[Example]) -> Kind:
    """Say what all examples are.

    Raises:
        DataError: There are none, or they are of more than one kind.
        TypeError: One is no example.
    """
    kinds: dict[type, Kind] = {
        str: "text",
        PromptCompletion: "prompt/completion",
        Conversation: "conversation",
        MultipleChoice: "multiple choice",
    }
    types = {type(example) for example in examples}
    if foreign := types - set(kinds):
        raise TypeError(
            "examples must be str, PromptCompletion, Conversation or MultipleChoice, got "
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
    return sum(len(text.encode()) for text in texts_of(example))


def texts_of(example: Example) -> Collection[str]:
    """Return the texts that an example is made of (each choice once)."""
    if isinstance(example, str):
        return (example,)
    if isinstance(example, PromptCompletion):
        return (example.prompt, example.completion)
    if isinstance(example, Conversation):
        return tuple(message.content for message in example.messages)
    return {*example.contexts, *example.choices}
