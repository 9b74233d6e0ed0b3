"""How well a model predicts text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prodial_kernels.training.data.batches import check_sizes
from prodial_kernels.training.data.chat import rendered
from prodial_kernels.training.data.examples import (
    Conversation,
    DataError,
    Example,
    MultipleChoice,
    PromptCompletion,
    kind_of,
)
from prodial_kernels.training.data.tokenization import (
    encode,
    encode_pairs,
    encode_up_to,
    prefix_token,
)
from prodial_kernels.training.scoring.log_likelihood import (
    Scorer,
    Window,
    cut_by,
    windows,
)
from prodial_kernels.training.scoring.multiple_choice import (
    MultipleChoiceMetrics,
    evaluate_multiple_choice,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LanguageModelMetrics:
    """How well a text is predicted.

    Attributes:
        loss: Nats per token.
        perplexity: ``exp(loss)``, infinite where that overflows.
        bits_per_byte: Total bits by the UTF-8 bytes of the scored text: comparable between
            models with different tokenizers.
        n_tokens: Tokens scored, each exactly once.
        n_bytes: UTF-8 bytes of the text they spell.
        n_documents: Documents, or completions, scored.
        n_truncated: Completions whose prompts did not fit beside them and lost their start.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int
    n_documents: int
    n_truncated: int = 0


def evaluate_language_model(
    scorer: Scorer, documents: Sequence[str], *, max_tokens: int | None = None
) -> LanguageModelMetrics:
    """Score every token of every document exactly once.

    Each document is scored by itself, as lm-evaluation-harness does for bits per byte: its first
    token is predicted from BOS (EOS where the tokenizer has no BOS), which is read but not scored;
    no EOS is added or scored. (The harness also scores the BOS of tokenizers that add one.) A
    document longer than ``seq_len`` is scored in windows, see ``scoring.windows``.

    Args:
        scorer: The model, and how it is run.
        documents: Texts, in order; blank ones have no tokens to score and count for nothing.
        max_tokens: Stop after at most this many tokens: later documents are left out, and the one
            that reaches the limit is shortened before it is tokenised, so that tokens and bytes
            still belong together.

    Raises:
        DataError: No text to score, no BOS or EOS token, or a tokenizer of another model.
        EvaluationError: The loss is not finite.
        TypeError: ``documents`` is a single string.
        ValueError: ``max_tokens`` is less than 1.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a sequence of strings, got one string; put it in a list")
    check_sizes({"max_tokens": (1 if max_tokens is None else max_tokens, 1)})
    tokenizer = scorer.tokenizer
    prefix = torch.tensor([prefix_token(tokenizer)], dtype=torch.int32)
    pairs: list[tuple[Tensor, Tensor]] = []
    n_bytes = n_tokens = 0
    for text, ids in encode_up_to(tokenizer, documents, max_tokens):
        full = max_tokens is not None and n_tokens + len(ids) >= max_tokens
        if max_tokens is not None and full:
            text, ids = _shorten(tokenizer, text, ids, max_tokens - n_tokens)
        if len(ids):
            pairs.append((prefix, ids))
            n_tokens += len(ids)
            n_bytes += len(text.encode())
        if full:
            break
    return _metrics(scorer, pairs, n_bytes)


def evaluate_completions(
    scorer: Scorer, examples: Sequence[PromptCompletion]
) -> LanguageModelMetrics:
    """Score every token of every completion exactly once, after its prompt.

    A prompt that does not fit into ``seq_len`` together with its completion loses its start.

    Raises:
        DataError: No examples, or a tokenizer of another model.
        EvaluationError: The loss is not finite.
    """
    pairs = encode_pairs(scorer.tokenizer, [(e.prompt, e.completion) for e in examples])
    # White space at the end of a prompt is scored with the completion (see encode_pairs).
    n_bytes = sum(
        len((e.prompt[len(e.prompt.rstrip()) :] + e.completion).encode()) for e in examples
    )
    return _metrics(scorer, pairs, n_bytes)


def evaluate_examples(
    scorer: Scorer, examples: Sequence[Example], *, max_tokens: int | None = None
) -> LanguageModelMetrics | MultipleChoiceMetrics:
    """Evaluate examples of any one kind with the function for that kind, whose errors it raises.

    ``max_tokens`` is for texts; other kinds are scored whole. DataError for several kinds.
    """
    kind = kind_of(examples)
    if kind == "multiple choice":
        choices = [e for e in examples if isinstance(e, MultipleChoice)]
        return evaluate_multiple_choice(scorer, choices)
    if kind in ("prompt/completion", "conversation"):
        pairs = [e for e in examples if isinstance(e, (PromptCompletion, Conversation))]
        completions = rendered(pairs, scorer.tokenizer)
        return evaluate_completions(
            scorer, [e for e in completions if isinstance(e, PromptCompletion)]
        )
    texts = [e for e in examples if isinstance(e, str)]
    return evaluate_language_model(scorer, texts, max_tokens=max_tokens)


def _metrics(
    scorer: Scorer, pairs: Sequence[tuple[Tensor, Tensor]], n_bytes: int
) -> LanguageModelMetrics:
    scored: list[Window] = []
    n_truncated = 0
    for context, continuation in pairs:
        scored.extend(windows(context, continuation, scorer.seq_len))
        n_truncated += cut_by(context, continuation, scorer.seq_len)
    n_tokens = sum(window.n_scored for window in scored)
    if not n_tokens:
        raise DataError("there is no text to score: all documents are empty")
    total = float(-scorer.log_likelihoods(scored).sum())
    loss = total / n_tokens
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    bits_per_byte = total / math.log(2) / n_bytes
    return LanguageModelMetrics(
        loss, perplexity, bits_per_byte, n_tokens, n_bytes, len(pairs), n_truncated
    )


def _shorten(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Tensor, n_tokens: int
) -> tuple[str, Tensor]:
    """Cut the end off a text until it has at most ``n_tokens`` tokens."""
    while len(ids) > n_tokens:
        # In proportion, but always by something; cutting text, not tokens, keeps its bytes exact.
        text = text[: min(len(text) - 1, len(text) * n_tokens // len(ids))]
        ids = next(encode(tokenizer, [text]))
    return text, ids
