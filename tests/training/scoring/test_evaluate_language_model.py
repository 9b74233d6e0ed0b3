"""Loss, perplexity and bits per byte against a slow, plain computation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.training.data.examples import DataError, MultipleChoice, PromptCompletion
from prodial_kernels.training.scoring.language_model import (
    LanguageModelMetrics,
    evaluate_completions,
    evaluate_examples,
    evaluate_language_model,
)
from prodial_kernels.training.scoring.log_likelihood import (
    EvaluationError,
    Scorer,
    Window,
    windows,
)
from prodial_kernels.training.scoring.multiple_choice import MultipleChoiceMetrics

DOCUMENTS = ["The cat sat.", "", "é" * 30, "x", "A longer text that needs several windows. " * 3]


def slow_nats(model: Any, context: list[int], text: list[int], seq_len: int) -> float:
    """Score one token at a time, each after the tokens that its window shows."""
    total = 0.0
    tokens = context + text
    for place in range(len(text)):
        window_end = min((place // seq_len + 1) * seq_len, len(text)) + len(context)
        start = max(0, window_end - seq_len - 1)
        seen = torch.tensor([tokens[start : len(context) + place]])
        with torch.no_grad():
            logits = model(input_ids=seen).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[text[place]])
    return total


@pytest.mark.parametrize("seq_len", [16, 200])
def test_every_token_is_scored_once(byte_tokenizer: Any, tiny_mamba2: Any, seq_len: int) -> None:
    metrics = evaluate_language_model(
        Scorer(tiny_mamba2, byte_tokenizer, seq_len=seq_len, batch_size=3), DOCUMENTS
    )
    n_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    nats = sum(
        slow_nats(tiny_mamba2, [0], byte_tokenizer(text)["input_ids"], seq_len)
        for text in DOCUMENTS
    )
    assert metrics.n_tokens == metrics.n_bytes == n_bytes  # one token per byte
    assert metrics.n_documents == 4
    assert metrics.loss == pytest.approx(nats / n_bytes, rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(metrics.loss))
    assert metrics.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_changes_nothing(byte_tokenizer: Any, tiny_mamba2: Any, batch_size: int) -> None:
    one, other = (
        evaluate_language_model(
            Scorer(tiny_mamba2, byte_tokenizer, seq_len=16, batch_size=size), DOCUMENTS
        ).loss
        for size in (5, batch_size)
    )
    assert one == pytest.approx(other, rel=1e-6)


def test_bits_per_byte_counts_bytes_not_tokens(merging_tokenizer: Any, tiny_mamba2: Any) -> None:
    metrics = evaluate_language_model(
        Scorer(tiny_mamba2, merging_tokenizer, seq_len=16), ["the the é"]
    )
    assert metrics.n_bytes == 10
    assert metrics.n_tokens == len(merging_tokenizer("the the é")["input_ids"]) < 10
    expected = metrics.loss * metrics.n_tokens / math.log(2) / 10
    assert metrics.bits_per_byte == pytest.approx(expected)


@pytest.mark.parametrize("max_tokens", [1, 12, 13, 20, 30, 75, 10_000])
def test_max_tokens_shortens_text_and_bytes_alike(
    merging_tokenizer: Any, tiny_mamba2: Any, max_tokens: int
) -> None:
    documents = ["the cat", "ab the ab thé the" * 3, "never reached" * 5]
    metrics = evaluate_language_model(
        Scorer(tiny_mamba2, merging_tokenizer, seq_len=16), documents, max_tokens=max_tokens
    )
    total = sum(len(merging_tokenizer(text)["input_ids"]) for text in documents)
    assert min(max_tokens, total) - 6 < metrics.n_tokens <= max_tokens
    # Some start of the documents spells exactly these tokens and bytes.
    joined, spelled = "", False
    for text in documents:
        starts = [text[:n] for n in range(len(text) + 1)]
        spelled |= any(
            len((joined + start).encode()) == metrics.n_bytes
            and sum(len(merging_tokenizer(t)["input_ids"]) for t in (*done(documents, text), start))
            == metrics.n_tokens
            for start in starts
        )
        joined += text
    assert spelled


def done(documents: list[str], text: str) -> list[str]:
    return documents[: documents.index(text)]


def test_completions_are_scored_without_their_prompts(
    byte_tokenizer: Any, tiny_mamba2: Any
) -> None:
    examples = [PromptCompletion("ask: ", "tell"), PromptCompletion("", "é")]
    metrics = evaluate_completions(Scorer(tiny_mamba2, byte_tokenizer, seq_len=64), examples)
    ids = byte_tokenizer("ask: tell")["input_ids"]
    # The prompt's trailing space is scored with the completion, where the vocabulary would put it.
    nats = slow_nats(tiny_mamba2, ids[:4], ids[4:], 64)
    nats += slow_nats(tiny_mamba2, [0], byte_tokenizer("é")["input_ids"], 64)
    assert metrics.n_tokens == 5 + 2
    assert metrics.n_bytes == 5 + 2
    assert metrics.loss == pytest.approx(nats / 7, rel=1e-5)


def test_examples_go_to_the_function_of_their_kind(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    def run(examples: list[Any]) -> Any:
        return evaluate_examples(
            Scorer(tiny_mamba2, byte_tokenizer, seq_len=16), examples, max_tokens=5
        )

    assert run(["some text"]).n_tokens <= 5
    assert isinstance(run([PromptCompletion("a", "b")]), LanguageModelMetrics)
    choice = MultipleChoice(("a", "a"), ("b", "c"), 0)
    assert isinstance(run([choice]), MultipleChoiceMetrics)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_context", [1, 3, 20])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 23])
def test_windows_score_each_token_once_and_fit(n_context: int, n: int) -> None:
    context, continuation = torch.arange(n_context), 100 + torch.arange(n)
    cut = list(windows(context, continuation, 8))
    assert torch.cat([w.tokens[-w.n_scored :] for w in cut]).tolist() == continuation.tolist()
    everything = torch.cat([context, continuation]).tolist()
    for window in cut:
        tokens = window.tokens.tolist()
        assert window.n_scored < len(tokens) <= 9
        at = everything.index(tokens[0])
        assert everything[at : at + len(tokens)] == tokens
        assert at == 0 or len(tokens) == 9  # as much context as fits


# --- the model's state, and errors ---------------------------------------------------------------


class Constant(nn.Module):
    """Predicts ``logits`` everywhere; its dropout shows the mode it ran in."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert torch.is_inference_mode_enabled()
        assert not self.dropout.training
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_uniform_model_has_the_loss_of_its_vocabulary(byte_tokenizer: Any) -> None:
    model = Constant(torch.zeros(257, dtype=torch.bfloat16))
    metrics = evaluate_language_model(Scorer(model, byte_tokenizer, seq_len=32), DOCUMENTS)
    assert metrics.loss == pytest.approx(math.log(257), rel=1e-6)
    assert metrics.perplexity == pytest.approx(257, rel=1e-5)


def test_modes_are_restored_even_after_an_error(byte_tokenizer: Any) -> None:
    model = Constant(torch.zeros(257)).train()
    model.frozen.eval()
    evaluate_language_model(Scorer(model, byte_tokenizer), ["x"])
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    with pytest.raises(ZeroDivisionError):
        evaluate_language_model(Scorer(model, byte_tokenizer, progress=lambda *_: 1 // 0), ["x"])  # type: ignore[arg-type]
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_progress_reaches_the_total(byte_tokenizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    evaluate_language_model(
        Scorer(
            Constant(torch.zeros(257)),
            byte_tokenizer,
            seq_len=10,
            batch_size=2,
            progress=lambda *call: calls.append(call),
        ),
        ["x" * 50],
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_perplexity_overflows_to_infinity(byte_tokenizer: Any) -> None:
    logits = torch.zeros(257)
    logits[0] = 1e4
    assert (
        evaluate_language_model(Scorer(Constant(logits), byte_tokenizer), ["x"]).perplexity
        == math.inf
    )


def test_non_finite_loss_is_an_error(byte_tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="2 of 2 log-likelihoods are not finite"):
        evaluate_language_model(
            Scorer(Constant(torch.full((257,), math.nan)), byte_tokenizer), ["x", "y"]
        )


def test_tokenizer_of_another_model(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    window = Window(torch.tensor([0, 264]), 1)
    with pytest.raises(DataError, match="token 264 is outside the model's vocabulary of 264"):
        Scorer(tiny_mamba2, byte_tokenizer).log_likelihoods([window])


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_nothing_to_score(byte_tokenizer: Any, documents: list[str]) -> None:
    with pytest.raises(DataError, match="no text to score"):
        evaluate_language_model(Scorer(Constant(torch.zeros(257)), byte_tokenizer), documents)


def test_sizes_out_of_range(byte_tokenizer: Any) -> None:
    model = Constant(torch.zeros(257))
    for name in ("seq_len", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Scorer(model, byte_tokenizer, **{name: 0})
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        evaluate_language_model(Scorer(model, byte_tokenizer), ["x"], max_tokens=0)


def test_one_string_is_no_list_of_documents(byte_tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="got one string; put it in a list"):
        evaluate_language_model(Scorer(Constant(torch.zeros(257)), byte_tokenizer), "text")


def test_prompts_that_lost_their_start_are_counted(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    rows = [PromptCompletion("p" * n, "ccc") for n in (5, 6, 40)]
    metrics = evaluate_examples(Scorer(tiny_mamba2, byte_tokenizer, seq_len=8), rows)
    # Eight tokens are read to score the last: six of the prompt and two of the completion.
    assert metrics.n_truncated == 1
    choices = [MultipleChoice(("c" * n,) * 2, ("aa", "bbb"), 0, "") for n in (5, 6, 7)]
    assert (
        evaluate_examples(Scorer(tiny_mamba2, byte_tokenizer, seq_len=8), choices).n_truncated == 1
    )
    texts = ["a long document in several windows"]
    assert evaluate_examples(Scorer(tiny_mamba2, byte_tokenizer, seq_len=8), texts).n_truncated == 0
