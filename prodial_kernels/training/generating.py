"""Text from a model, with or without an adapter: what a prompt or a conversation goes on with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from prodial_kernels.files.json_values import JsonReport
from prodial_kernels.models.layers.decoding import Reader, clamp_steps
from prodial_kernels.models.layers.head import eval_mode
from prodial_kernels.training.data.chat import prompt_of
from prodial_kernels.training.data.examples import DataError, Message
from prodial_kernels.training.data.tokenization import encode, leading_tokens, prefix_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# After so many tokens what is no whole character yet will not become one: a character has at most
# four bytes, and a token at least one.
_TOKENS_WAITED_FOR = 8


class GenerationError(ValueError):
    """Text cannot be generated; the message says what to do."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when generating ends.

    Attributes:
        max_new_tokens: Stop after so many tokens; at least 1.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is
            drawn.
        top_p: Draw from the likeliest tokens that together have this probability; in (0, 1].
        seed: Of the drawing, which happens on the CPU: equal logits give equal texts on any device.

    Raises:
        GenerationError: A value is out of its range, or would have no effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and self.top_p < 1:
            raise GenerationError(
                f"top_p={self.top_p} would have no effect at temperature 0, which takes the "
                "likeliest token; give a temperature, such as 0.7"
            )
        if not 0 <= self.seed < 1 << 64:
            raise GenerationError(f"seed must be 0 or more and below 2**64, got {self.seed}")


@dataclass(frozen=True)
class Generation(JsonReport):
    """What a model went on with. ``str()`` is the text.

    Attributes:
        prompt: What it read, as text; of a conversation what the chat template made of it.
        text: What it wrote, without special tokens.
        tokens: The ids of that, with the one that ended it.
        prompt_tokens: How many tokens it read.
        ended: ``"end token"``, or ``"max_new_tokens"`` where it was stopped.
        seconds: How long it took.
        notes: What a reader should know of how it was done, a line each.
    """

    prompt: str
    text: str
    tokens: Sequence[int]
    prompt_tokens: int
    ended: Literal["end token", "max_new_tokens"]
    seconds: float
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def summary(self) -> str:
        """How much was read and written, how fast, and why it ended, in one line."""
        rate = len(self.tokens) / max(self.seconds, 1e-9)
        return (
            f"{self.prompt_tokens:,} tokens read, {len(self.tokens):,} written, "
            f"{rate:.1f} a second; ended by {self.ended}"
        )


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    sampling: Sampling = Sampling(),
    *,
    on_text: Callable[[str], object] | None = None,
) -> Generation:
    """Let a causal language model go on with a prompt, or answer a conversation.

    Every token is chosen by the logits that one forward over all of the text before it gives, also
    where the model's own cache would compute something else; see
    :mod:`prodial_kernels.models.layers.decoding`.

    Args:
        model: A causal language model of transformers, with or without an adapter. Its modes stay.
        tokenizer: Its tokenizer.
        prompt: A text, begun by BOS if the tokenizer does so (empty: BOS or EOS alone); or the
            turns of a conversation, which the tokenizer's chat template makes a text of.
        sampling: How tokens are chosen, and when to stop.
        on_text: Called with each new piece of text, whole characters, as it comes.

    Raises:
        DataError: The chat template does not take the turns, or the tokenizer belongs to another
            model.
        GenerationError: The tokenizer has no chat template, or logits are not finite.
    """
    started = time.perf_counter()
    if not isinstance(prompt, str):
        check_chat(tokenizer)
    text = prompt if isinstance(prompt, str) else prompt_of(prompt, tokenizer)
    ids = _prompt_tokens(tokenizer, text, model)
    ends = end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(sampling.seed)
    pieces = _Pieces(tokenizer)
    say = on_text or (lambda _: None)
    tokens: list[int] = []
    # Not inference mode: a layer may cache what it makes of its weights, to be trained on later.
    with torch.no_grad(), eval_mode(model), clamp_steps(model):
        reader = Reader(model)
        logits = reader.read(ids)
        while True:
            tokens.append(_chosen(logits, sampling, generator))
            ended = tokens[-1] in ends
            if not ended and (piece := pieces.of(tokens)):
                say(piece)
            if ended or len(tokens) == sampling.max_new_tokens:
                break
            logits = reader.read(tokens[-1:])
    written = tokens[:-1] if ended else tokens
    if piece := pieces.of(written, last=True):
        say(piece)
    notes = []
    if reader.why is not None:
        notes.append(f"the whole text was read for every token: {reader.why}")
    if isinstance(prompt, str) and text.endswith(" "):
        notes.append(
            "the prompt ends in a space, which most tokenizers put before the next word, and so "
            "does training on prompts and completions; leave it out if the text is odd"
        )
    return Generation(
        prompt=text,
        text=text_of(tokenizer, written),
        tokens=tokens,
        prompt_tokens=len(ids),
        ended="end token" if ended else "max_new_tokens",
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GenerationError where the tokenizer has no template to make a text of turns."""
    if not getattr(tokenizer, "chat_template", None):
        raise GenerationError(
            "the tokenizer of this model has no chat template to make a text of a conversation; "
            "give the text itself, or take a model whose tokenizer has one"
        )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's EOS and those of the model's settings."""
    found = [tokenizer.eos_token_id]
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(settings, "eos_token_id", None)
        found += ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(int(token) for token in found if token is not None)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return what tokens spell, without special ones."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, model: Any) -> list[int]:
    ids: list[int] = next(encode(tokenizer, [text])).tolist() if text else []
    ids = leading_tokens(tokenizer) + ids
    # A model cannot go on with nothing.
    ids = ids or [prefix_token(tokenizer)]
    size = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= size:
        raise DataError(
            f"token {max(ids)} is outside the model's vocabulary of {size}; the tokenizer belongs "
            "to another model"
        )
    return ids


def _chosen(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token by its logits, float32 ``[vocabulary]``."""
    logits = logits.cpu()
    if not torch.isfinite(logits).all():
        raise GenerationError(
            "the model's logits are not finite: its weights or activations have overflowed; check "
            "the training loss and the dtype"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In fp64, so that a small temperature does not overflow.
    likelihoods = (logits.double() / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        ordered, order = likelihoods.sort(descending=True, stable=True)
        # What the likelier ones have together; of the first nothing, so it always stays.
        before = ordered.cumsum(0) - ordered
        likelihoods[order[before >= sampling.top_p]] = 0
    return int(torch.multinomial(likelihoods, 1, generator=generator))


class _Pieces:
    """Tokens as text, in pieces of whole characters that together are the text of all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Tokens before the first have been said, up to the second; what a token spells may depend
        # on the one before it.
        self._start = self._said = 0

    def of(self, tokens: list[int], *, last: bool = False) -> str:
        """Return what can be said now, of all ``tokens`` so far; the rest too if they end here."""
        before = text_of(self._tokenizer, tokens[self._start : self._said])
        now = text_of(self._tokenizer, tokens[self._start :])
        # The end may be half a character, of which the next token has the other bytes.
        half = now.endswith("\ufffd") and len(tokens) - self._said < _TOKENS_WAITED_FOR
        if not last and (half or len(now) <= len(before)):
            return ""
        self._start, self._said = self._said, len(tokens)
        return now[len(before) :]
