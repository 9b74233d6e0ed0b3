"""Conversations as prompts and completions, by the chat template of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prodial_kernels.training.data.examples import (
    Conversation,
    DataError,
    Message,
    MultipleChoice,
    PromptCompletion,
)
from prodial_kernels.training.data.tokenization import leading_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered(
    examples: Iterable[PromptCompletion | Conversation | MultipleChoice],
    tokenizer: PreTrainedTokenizerBase,
) -> list[PromptCompletion | MultipleChoice]:
    """Replace each conversation by one prompt and completion for each turn of the assistant's.

    The prompt is what the template makes of the turns before, with the beginning of an answer; the
    completion is what the whole adds to it. The EOS that ends it is left to whoever trains on it,
    so it comes once.

    Raises:
        DataError: The tokenizer has no chat template, or its template does not take the turns.
    """
    out: list[PromptCompletion | MultipleChoice] = []
    number = 0
    for example in examples:
        if isinstance(example, Conversation):
            number += 1
            out.extend(_turns(example, number, tokenizer))
        else:
            out.append(example)
    return out


def prompt_of(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template makes of turns, with the beginning of the assistant's next one.

    A BOS that the tokenizer puts before every text by itself is left out, as in :func:`rendered`.

    Raises:
        DataError: The tokenizer has no chat template, or its template does not take the turns.
    """
    turns = [message._asdict() for message in messages]
    return _without_bos(_text(turns, 1, tokenizer, add_generation_prompt=True), tokenizer)


def _without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    # The tokenizer begins every text with it by itself.
    return text.removeprefix(str(tokenizer.bos_token)) if leading_tokens(tokenizer) else text


def _turns(
    conversation: Conversation, number: int, tokenizer: PreTrainedTokenizerBase
) -> Iterable[PromptCompletion]:
    messages = [message._asdict() for message in conversation.messages]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _text(messages[:index], number, tokenizer, add_generation_prompt=True)
        whole = _text(messages[: index + 1], number, tokenizer)
        if not whole.startswith(prompt):
            raise DataError(
                f"conversation {number}: the chat template of the tokenizer does not continue what "
                "it prompts for, so the answer cannot be told from the prompt; give rows with "
                "'prompt' and 'completion'"
            )
        completion = whole[len(prompt) :]
        stripped = completion.rstrip()
        if tokenizer.eos_token and stripped.endswith(tokenizer.eos_token):
            completion = stripped.removesuffix(tokenizer.eos_token)
        if completion.strip():
            yield PromptCompletion(_without_bos(prompt, tokenizer), completion)


def _text(
    messages: list[dict[str, Any]],
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    **options: bool,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the data holds conversations, but the tokenizer of this model has no chat template to "
            "make text of them; give rows with 'prompt' and 'completion', or take a model whose "
            "tokenizer has one"
        )
    if not messages:
        # The assistant begins: there is nothing to read before its answer.
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    # Templates raise what they like for roles that they do not know or an order they refuse.
    except Exception as error:
        raise DataError(
            f"conversation {number}: the chat template of the tokenizer refuses it: "
            f"{type(error).__name__}: {error!s:.200}"
        ) from error
