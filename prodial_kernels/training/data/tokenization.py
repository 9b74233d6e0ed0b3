"""Text to token tensors: whole documents, and pairs of a context and its continuation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prodial_kernels.training.data.examples import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers take some 170 bytes for every character that they are given at once, and return Python
# lists. Taking texts in groups, and long texts in pieces, of about this many characters keeps that
# short-lived, while only tensors of 4 bytes a token stay.
CHARACTERS_AT_ONCE = 1 << 17
# What is read on both sides of a place where a long text may be cut. No word is this long.
_AROUND_A_CUT = 128
# How many places of each kind are tried before a piece is made longer.
_CUTS_TRIED = 8


class EncodedPair(NamedTuple):
    """Token ids of a context (at least one) and of the continuation (at least one); int32."""

    context: Tensor
    continuation: Tensor


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Tensor]:
    """Tokenise texts without adding special tokens.

    Yields:
        One int32 tensor ``[n_tokens]`` for each text, in order.
    """
    for _, ids in encode_up_to(tokenizer, texts, None):
        yield ids


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]
) -> Iterator[Tensor]:
    """Tokenise documents, each ended by EOS (and begun by BOS, if the model does)."""
    before = torch.tensor(leading_tokens(tokenizer), dtype=torch.int32)
    after = torch.tensor([eos_token(tokenizer)], dtype=torch.int32)
    for ids in encode(tokenizer, documents):
        yield torch.cat([before, ids, after])


def encode_up_to(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], n_tokens: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Tokenise texts until there are ``n_tokens`` tokens in all, or more; None for all texts.

    Yields:
        Each text, in order, and its tokens, int32 ``[n]``, without special ones. A long text that
        reaches ``n_tokens`` may be its beginning only.
    """
    so_far = 0
    for start, end in _groups(texts):
        if len(texts[start]) <= CHARACTERS_AT_ONCE:
            group = list(texts[start:end])
            encoded: Iterable[tuple[str, Tensor]] = zip(
                group, map(_tensor, _ids(tokenizer, group)), strict=True
            )
        else:
            left = None if n_tokens is None else n_tokens - so_far
            encoded = [_long(tokenizer, texts[start], left)]
        for text, ids in encoded:
            yield text, ids
            so_far += len(ids)
            if n_tokens is not None and so_far >= n_tokens:
                return


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[EncodedPair]:
    """Tokenise contexts with their continuations the way lm-evaluation-harness does.

    White space at the end of the context moves to the continuation (most vocabularies have tokens
    that begin with a space, none that end in one). Both are then encoded as one text, and the
    continuation is what comes after as many tokens as the context alone has. An empty context is
    the token of :func:`prefix_token`; tokenizers that begin every text with BOS do so here. Where
    the continuation has merged into the context's last token, it is encoded by itself.

    Raises:
        DataError: A continuation has no tokens, or the tokenizer has no BOS or EOS token.
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encoded_contexts = dict(zip(contexts, encode(tokenizer, contexts), strict=True))
    bos = torch.tensor(leading_tokens(tokenizer), dtype=torch.int32)
    prefix = torch.tensor([prefix_token(tokenizer)], dtype=torch.int32)

    encoded: list[EncodedPair] = []
    wholes = encode(tokenizer, [context + continuation for context, continuation in moved])
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        context_ids = encoded_contexts[context]
        continuation_ids = whole[len(context_ids) :]
        if not len(continuation_ids):
            continuation_ids = next(encode(tokenizer, [continuation]))
        if not len(continuation_ids):
            raise DataError(f"no tokens in the continuation {continuation!r:.60}")
        context_ids = torch.cat([bos, context_ids]) if context else prefix
        encoded.append(EncodedPair(context_ids, continuation_ids))
    return encoded


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what stands before a text's first token: BOS, else EOS; DataError without both."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError("the tokenizer has neither a BOS nor an EOS token; set tokenizer.eos_token")


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document; DataError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token to end documents; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ``[BOS]`` if the tokenizer begins every text with it by default, else ``[]``."""
    if tokenizer.bos_token_id is None:
        return []
    bos = int(tokenizer.bos_token_id)
    return [bos] if tokenizer("a")["input_ids"][:1] == [bos] else []


def _groups(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where groups begin and end; a text that is too long for one is a group of its own."""
    start = size = 0
    for index, text in enumerate(texts):
        if len(text) > CHARACTERS_AT_ONCE and start < index:
            yield start, index
            start = index
            size = 0
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield start, index + 1
            start, size = index + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # Texts longer than the model's window are split later; the warning would mislead.
        verbose=False,
    )["input_ids"]


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def _long(
    tokenizer: PreTrainedTokenizerBase, text: str, n_tokens: int | None
) -> tuple[str, Tensor]:
    """Tokenise a long text piece by piece, until there are ``n_tokens`` or it ends.

    A piece ends where the tokenizer divides the text in any case. Every piece but the first is
    read together with the end of the one before, whose tokens are then left out: tokenizers may
    treat the start of what they are given differently.
    """
    parts: list[Tensor] = []
    size = start = 0
    before: list[int] = []
    while start < len(text) and (n_tokens is None or size < n_tokens):
        end, next_before = _cut_after(tokenizer, text, start)
        (ids,) = _ids(tokenizer, [text[max(0, start - _AROUND_A_CUT) if start else 0 : end]])
        if ids[: len(before)] != before:
            # Against all appearances this tokenizer looks farther than that: take all at once.
            return text, _tensor(_ids(tokenizer, [text])[0])
        parts.append(_tensor(ids[len(before) :]))
        size += len(parts[-1])
        start, before = end, next_before
    return text[:start], torch.cat(parts)


def _cut_after(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> tuple[int, list[int]]:
    """Find where the piece from ``start`` ends, and the tokens just before that place."""
    end = start + CHARACTERS_AT_ONCE
    while end < len(text):
        for place in _places(text, start + CHARACTERS_AT_ONCE // 2, end):
            before = _divided(tokenizer, text, place)
            if before is not None:
                return place, before
        end += CHARACTERS_AT_ONCE
    return len(text), []


def _places(text: str, first: int, last: int) -> Iterator[int]:
    """Yield where a text may be cut: before lines, before spaces, behind words."""
    for mark, offset in (("\n", 1), (" ", 0)):
        place = last
        for _ in range(_CUTS_TRIED):
            place = text.rfind(mark, first, place)
            if place < 0:
                break
            # White space stays together: tokens may span it.
            if not text[place + 1].isspace() and not (offset == 0 and text[place - 1].isspace()):
                yield place + offset
    tried = 0
    for place in range(last - 1, first, -1):
        if text[place - 1].isalnum() and not text[place].isalnum():
            yield place
            tried += 1
            if tried == _CUTS_TRIED:
                return


def _divided(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> list[int] | None:
    """Return the tokens just before a place if the tokenizer divides the text there, else None."""
    beginning = max(0, place - _AROUND_A_CUT)
    (before,) = _ids(tokenizer, [text[beginning:place]])
    around = tokenizer(
        text[beginning : place + _AROUND_A_CUT], add_special_tokens=False, verbose=False
    )
    if not before or around["input_ids"][: len(before)] != before:
        return None
    words = around.word_ids() if tokenizer.is_fast else []
    # Tokens never span two words. A tokenizer that knows none takes all of a text for one.
    if len(before) < len(words) and len(set(words)) > 1:
        return before if words[len(before) - 1] != words[len(before)] else None
    return before
