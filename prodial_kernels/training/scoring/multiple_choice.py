"""Multiple-choice accuracy by likelihood, scored the way lm-evaluation-harness scores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prodial_kernels.training.data.examples import DataError, MultipleChoice
from prodial_kernels.training.data.tokenization import encode_pairs
from prodial_kernels.training.scoring.log_likelihood import (
    Scorer,
    Window,
    cut_by,
    windows,
)


@dataclass(frozen=True, slots=True)
class MultipleChoiceMetrics:
    """How often the right choice is the most likely one.

    Attributes:
        acc: Share of examples whose right choice has the highest log-likelihood.
        acc_norm: The same with log-likelihoods divided by the choices' lengths in characters.
        acc_stderr: Standard error of ``acc`` over the examples; NaN for a single one.
        acc_norm_stderr: Standard error of ``acc_norm``.
        n_examples: Examples scored.
        n_ties: Examples in which the highest log-likelihood belongs to more than one choice. As
            in lm-evaluation-harness the first of them counts as the prediction.
        n_truncated: Choices whose contexts did not fit beside them and lost their start.
    """

    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    n_examples: int
    n_ties: int
    n_truncated: int = 0


def evaluate_multiple_choice(
    scorer: Scorer, examples: Sequence[MultipleChoice]
) -> MultipleChoiceMetrics:
    """Score every choice after its context and count how often the right one wins.

    Contexts and choices are joined as lm-evaluation-harness does (see
    ``tokenization.encode_pairs``). A context that does not fit into ``seq_len`` together with its
    choice loses its start.

    Raises:
        DataError: No examples, or a tokenizer of another model.
        EvaluationError: A log-likelihood is not finite.
    """
    if not examples:
        raise DataError("there are no examples to evaluate")
    right: list[bool] = []
    right_normalised: list[bool] = []
    n_ties = 0
    for example, scores in zip(examples, choice_log_likelihoods(scorer, examples), strict=True):
        lengths = torch.tensor([float(len(c)) for c in example.choices], dtype=torch.float64)
        # An empty choice has no length to divide by; it never wins.
        normalised = torch.where(lengths > 0, scores / lengths, -math.inf)
        right.append(_first_highest(scores) == example.label)
        right_normalised.append(_first_highest(normalised) == example.label)
        n_ties += int((scores == scores.max()).sum() > 1)
    acc, acc_stderr = _mean_and_error(right)
    acc_norm, acc_norm_stderr = _mean_and_error(right_normalised)
    # Known by their lengths: tokenising once more costs little beside running the model.
    texts = [e.pair(i) for e in examples for i in range(len(e.choices))]
    pairs = encode_pairs(scorer.tokenizer, texts)
    return MultipleChoiceMetrics(
        acc, acc_norm, acc_stderr, acc_norm_stderr, len(examples), n_ties,
        sum(cut_by(pair.context, pair.continuation, scorer.seq_len) for pair in pairs),
    )  # fmt: skip


def choice_log_likelihoods(scorer: Scorer, examples: Sequence[MultipleChoice]) -> list[Tensor]:
    """Return the log-likelihood of every choice, in nats: for each example float64 ``[n_choices]``.

    Arguments and errors are those of :func:`evaluate_multiple_choice`.
    """
    texts = [example.pair(i) for example in examples for i in range(len(example.choices))]
    scored: list[Window] = []
    owners: list[int] = []
    for owner, pair in enumerate(encode_pairs(scorer.tokenizer, texts)):
        parts = list(windows(pair.context, pair.continuation, scorer.seq_len))
        scored.extend(parts)
        owners.extend([owner] * len(parts))
    by_choice = torch.zeros(len(texts), dtype=torch.float64)
    by_choice.index_add_(0, torch.tensor(owners), scorer.log_likelihoods(scored))
    return list(by_choice.split([len(example.choices) for example in examples]))


def _first_highest(scores: Tensor) -> int:
    # torch.argmax leaves open which of several maxima it returns.
    return int((scores == scores.max()).nonzero()[0])


def _mean_and_error(right: Sequence[bool]) -> tuple[float, float]:
    mean = sum(right) / len(right)
    if len(right) < 2:
        return mean, math.nan
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1))
