"""Multiple-choice accuracy against a slow, plain computation."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.training.data.examples import DataError, MultipleChoice
from prodial_kernels.training.data.splits import read_whole
from prodial_kernels.training.scoring.log_likelihood import Scorer
from prodial_kernels.training.scoring.multiple_choice import (
    choice_log_likelihoods,
    evaluate_multiple_choice,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"
FILES = ("hellaswag.jsonl", "winogrande.jsonl", "arc.jsonl", "multiple_choice.jsonl")


def all_examples() -> list[MultipleChoice]:
    examples = [example for name in FILES for example in read_whole(FIXTURES / name).examples]
    return [example for example in examples if isinstance(example, MultipleChoice)]


def slow_log_likelihood(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    stripped = context.rstrip()
    whole = tokenizer(context + choice)["input_ids"]
    n_context = len(tokenizer(stripped)["input_ids"])
    total = 0.0
    for place in range(n_context, len(whole)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[whole[place]])
    return total


def test_against_the_slow_way(merging_tokenizer: Any, tiny_mamba2: Any) -> None:
    examples = all_examples()
    assert len(examples) == 10
    fast = choice_log_likelihoods(Scorer(tiny_mamba2, merging_tokenizer, batch_size=4), examples)
    right = right_normalised = 0
    for example, scores in zip(examples, fast, strict=True):
        slow = [
            slow_log_likelihood(tiny_mamba2, merging_tokenizer, *example.pair(i))
            for i in range(len(example.choices))
        ]
        assert scores.tolist() == pytest.approx(slow, rel=1e-5)
        normalised = [s / len(c) for s, c in zip(slow, example.choices, strict=True)]
        right += slow.index(max(slow)) == example.label
        right_normalised += normalised.index(max(normalised)) == example.label
    metrics = evaluate_multiple_choice(
        Scorer(tiny_mamba2, merging_tokenizer, batch_size=7), examples
    )
    assert metrics.acc == pytest.approx(right / 10)
    assert metrics.acc_norm == pytest.approx(right_normalised / 10)
    assert metrics.acc_stderr == pytest.approx(math.sqrt(metrics.acc * (1 - metrics.acc) / 9))
    assert (metrics.n_examples, metrics.n_ties) == (10, 0)


class Unigram(nn.Module):
    """Predicts the same log-probabilities everywhere, so that scores can be chosen."""

    def __init__(self, log_probabilities: dict[int, float]) -> None:
        super().__init__()
        logits = torch.full((257,), -20.0)
        for token, value in log_probabilities.items():
            logits[token] = value
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def question(*choices: str, label: int) -> MultipleChoice:
    return MultipleChoice(("q",) * len(choices), choices, label, delimiter="")


def test_normalising_by_length_can_change_the_answer(byte_tokenizer: Any) -> None:
    a, b = byte_tokenizer("ab")["input_ids"]
    model = Unigram({a: 0.0, b: -0.5})
    # -0.47 x 4 is less likely than -0.97 x 1, but more likely per character.
    metrics = evaluate_multiple_choice(
        Scorer(model, byte_tokenizer),
        [question("aaaa", "b", label=0), question("aaaa", "b", label=1)],
    )
    raw = choice_log_likelihoods(Scorer(model, byte_tokenizer), [question("aaaa", "b", label=0)])[0]
    assert raw[0] < raw[1]
    assert raw[0] / 4 > raw[1]
    assert (metrics.acc, metrics.acc_norm) == (0.5, 0.5)
    first = evaluate_multiple_choice(
        Scorer(model, byte_tokenizer), [question("aaaa", "b", label=0)]
    )
    assert (first.acc, first.acc_norm) == (0.0, 1.0)
    assert math.isnan(first.acc_stderr)


def test_lengths_are_characters_without_the_delimiter(byte_tokenizer: Any) -> None:
    a, umlaut = byte_tokenizer("a")["input_ids"][0], byte_tokenizer("ü")["input_ids"]
    model = Unigram({a: 0.0, umlaut[0]: 0.0, umlaut[1]: 0.0})
    example = MultipleChoice(("q", "q"), ("üü", "aaa"), 1)
    scores = choice_log_likelihoods(Scorer(model, byte_tokenizer), [example])[0]
    assert scores[0] / 2 < scores[1] / 3  # by characters the second wins,
    assert scores[0] / 4 > scores[1] / 3  # by bytes the first would
    assert evaluate_multiple_choice(Scorer(model, byte_tokenizer), [example]).acc_norm == 1.0


def test_ties_go_to_the_first_and_are_counted(byte_tokenizer: Any) -> None:
    a, b = byte_tokenizer("ab")["input_ids"]
    model = Unigram({a: 0.0, b: 0.0})
    examples = [question("a", "b", label=label) for label in (0, 1)]
    metrics = evaluate_multiple_choice(Scorer(model, byte_tokenizer), examples)
    assert (metrics.acc, metrics.acc_norm, metrics.n_ties) == (0.5, 0.5, 2)
    assert evaluate_multiple_choice(Scorer(model, byte_tokenizer), examples[:1]).acc == 1.0


def test_an_empty_choice_never_wins_the_normalised_score(byte_tokenizer: Any) -> None:
    space = byte_tokenizer(" ")["input_ids"][0]
    example = MultipleChoice(("q", "q"), ("", "xy"), 0)
    metrics = evaluate_multiple_choice(Scorer(Unigram({space: 0.0}), byte_tokenizer), [example])
    assert (metrics.acc, metrics.acc_norm) == (1.0, 0.0)


def test_long_contexts_lose_their_start(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    long = MultipleChoice(("z" * 50 + "context",) * 2, ("one", "three"), 0)
    short = MultipleChoice(("context",) * 2, ("one", "three"), 0)
    scores = choice_log_likelihoods(Scorer(tiny_mamba2, byte_tokenizer, seq_len=10), [long])[0]
    # Ten tokens are read: of " one" the last is only predicted, so seven of the context remain.
    expected = choice_log_likelihoods(Scorer(tiny_mamba2, byte_tokenizer, seq_len=64), [short])[0]
    assert float(scores[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert float(scores[1]) != pytest.approx(float(expected[1]), rel=1e-5)
    # A choice longer than the window is still scored whole, in parts.
    tiny = choice_log_likelihoods(Scorer(tiny_mamba2, byte_tokenizer, seq_len=2), [long])[0]
    assert torch.isfinite(tiny).all()


def test_no_examples(byte_tokenizer: Any, tiny_mamba2: Any) -> None:
    with pytest.raises(DataError, match="no examples to evaluate"):
        evaluate_multiple_choice(Scorer(tiny_mamba2, byte_tokenizer), [])
