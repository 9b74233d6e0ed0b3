"""What ``prodial generate`` goes on with, and conversations on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from prodial_kernels.training.config import ConfigError

if TYPE_CHECKING:
    from prodial_kernels.models.loading.load import LoadedModel
    from prodial_kernels.training.data.examples import Message
    from prodial_kernels.training.generating import Sampling


def prompt_given(values: Mapping[str, object]) -> str | list[Message] | None:
    """Return the text or the turns that options and standard input give.

    None for a conversation on the terminal.

    Raises:
        ConfigError: There is nothing to go on with, or options that have no effect together.
    """
    from prodial_kernels.training.data.examples import Message

    chat = "chat" in values
    if "system" in values and not chat:
        raise ConfigError("`system` would have no effect without `chat`; add it, or leave it out")
    prompt = values.get("prompt")
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            if chat and "json" not in values:
                return None
            raise ConfigError(
                "there is nothing to go on with: give `prompt`, a text on standard input, or "
                "`chat` for a conversation"
            )
        prompt = sys.stdin.read()
    if not chat:
        return str(prompt)
    return [*_system(values.get("system")), Message("user", str(prompt))]


def converse(
    loaded: LoadedModel,
    sampling: Sampling,
    *,
    system: object = None,
    say: Callable[[str], object],
) -> None:
    """Answer what is typed, turn by turn, until the end of input.

    Every answer reads the whole conversation anew, because the caches of some models forget what
    they hold when they are given more than one token.
    """
    from prodial_kernels.training.data.examples import Message
    from prodial_kernels.training.generating import check_chat, generate

    check_chat(loaded.tokenizer)
    say("an empty line, or the end of input (Ctrl-D), ends the conversation")
    messages = _system(system)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append(Message("user", text))
        answer = generate(loaded.model, loaded.tokenizer, messages, sampling, on_text=show)
        print(flush=True)
        for line in (*answer.notes, answer.summary):
            say(line)
        messages.append(Message("assistant", answer.text))


def show(piece: str) -> None:
    """Print text as it comes; on a terminal without the characters that it would obey."""
    if sys.stdout.isatty():
        piece = "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in piece)
    print(piece, end="", flush=True)


def _harmless(character: str) -> bool:
    # C0 and C1 controls begin what a terminal takes for commands.
    return character in "\n\t" or not (character < " " or "\x7f" <= character < "\xa0")


def _system(text: object) -> list[Message]:
    from prodial_kernels.training.data.examples import Message

    return [] if text is None else [Message("system", str(text))]
