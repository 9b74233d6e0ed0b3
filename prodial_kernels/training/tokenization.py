"""Text to token tensors: whole documents, and pairs of a context and its continuation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prodial_kernels.training.schemas import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers return Python lists, at some 40 bytes a token; taking texts in groups of about this
# many characters keeps those short-lived, while only tensors of 4 bytes a token stay.
_CHARACTERS_AT_ONCE = 1 << 18


class EncodedPair(NamedTuple):
    """Token ids of a context (at least one) and of the continuation (at least one); int32."""

    context: Tensor
    continuation: Tensor


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Tensor]:
    """Tokenise texts without adding special tokens.

    Yields:
        One int32 tensor ``[n_tokens]`` for each text, in order.
    """
    for start, end in _groups(texts):
        ids = tokenizer(
            list(texts[start:end]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            # Texts longer than the model's window are split later; the warning would mislead.
            verbose=False,
        )["input_ids"]
        yield from (torch.tensor(text_ids, dtype=torch.int32) for text_ids in ids)


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
    """Return the token that stands before a text's first: BOS, or EOS where there is no BOS.

    Raises:
        DataError: The tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError("the tokenizer has neither a BOS nor an EOS token; set tokenizer.eos_token")


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document.

    Raises:
        DataError: The tokenizer has none.
    """
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
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE:
            yield start, index + 1
            start, size = index + 1, 0
    if start < len(texts):
        yield start, len(texts)
