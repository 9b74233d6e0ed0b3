"""Multiple-choice accuracy by likelihood, scored the way lm-evaluation-harness scores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prodial_kernels.training.data.batches import check_sizes
from prodial_kernels.training.data.examples import DataError, MultipleChoice
from prodial_kernels.training.data.tokenization import encode_pairs, prefix_token
from prodial_kernels.training.scoring.log_likelihood import (
    Progress,
    Window,
    cut_by,
    log_likelihoods,
    windows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[MultipleChoice],
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> MultipleChoiceMetrics:
    """Score every choice after its context and count how often the right one wins.

    Contexts and choices are joined as lm-evaluation-harness does (see
    ``tokenization.encode_pairs``). A context that does not fit into ``seq_len`` together with its
    choice loses its start.

    Args:
        model: A causal language model of transformers, or one called like it.
        tokenizer: Its tokenizer.
        examples: The questions.
        seq_len: The most tokens that the model reads at once.
        batch_size: Windows in a forward pass.
        device: Where to put the inputs; by default where the model is.
        progress: Called with (windows done, windows in all).

    Returns:
        The metrics.

    Raises:
        DataError: No examples, or a tokenizer of another model.
        EvaluationError: A log-likelihood is not finite.
        ValueError: A size is out of range.
    """
    check_sizes({"seq_len": (seq_len, 1)})
    if not examples:
        raise DataError("there are no examples to evaluate")
    right: list[bool] = []
    right_normalised: list[bool] = []
    n_ties = 0
    per_example = choice_log_likelihoods(
        model,
        tokenizer,
        examples,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    for example, scores in zip(examples, per_example, strict=True):
        lengths = torch.tensor([float(len(c)) for c in example.choices], dtype=torch.float64)
        # An empty choice has no length to divide by; it never wins.
        normalised = torch.where(lengths > 0, scores / lengths, -math.inf)
        right.append(_first_highest(scores) == example.label)
        right_normalised.append(_first_highest(normalised) == example.label)
        n_ties += int((scores == scores.max()).sum() > 1)
    acc, acc_stderr = _mean_and_error(right)
    acc_norm, acc_norm_stderr = _mean_and_error(right_normalised)
    # Known by their lengths: tokenising once more costs little beside running the model.
    pairs = encode_pairs(tokenizer, [e.pair(i) for e in examples for i in range(len(e.choices))])
    return MultipleChoiceMetrics(
        acc, acc_norm, acc_stderr, acc_norm_stderr, len(examples), n_ties,
        sum(cut_by(pair.context, pair.continuation, seq_len) for pair in pairs),
    )  # fmt: skip


def choice_log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[MultipleChoice],
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Return the log-likelihood of every choice, in nats.

    Args:
        model: As for :func:`evaluate_multiple_choice`; so are the other arguments and errors.
        tokenizer: The model's tokenizer.
        examples: The questions.
        seq_len: The most tokens that the model reads at once.
        batch_size: Windows in a forward pass.
        device: Where to put the inputs; by default where the model is.
        progress: Called with (windows done, windows in all).

    Returns:
        For each example float64 ``[n_choices]``.
    """
    texts = [example.pair(i) for example in examples for i in range(len(example.choices))]
    scored: list[Window] = []
    owners: list[int] = []
    for owner, pair in enumerate(encode_pairs(tokenizer, texts)):
        parts = list(windows(pair.context, pair.continuation, seq_len))
        scored.extend(parts)
        owners.extend([owner] * len(parts))
    by_window = log_likelihoods(
        model,
        scored,
        batch_size=batch_size,
        pad_token=prefix_token(tokenizer),
        device=device,
        progress=progress,
    )
    by_choice = torch.zeros(len(texts), dtype=torch.float64)
    by_choice.index_add_(0, torch.tensor(owners), by_window)
    return list(by_choice.split([len(example.choices) for example in examples]))


def _first_highest(scores: Tensor) -> int:
    # torch.argmax leaves open which of several maxima it returns.
    return int((scores == scores.max()).nonzero()[0])


def _mean_and_error(right: Sequence[bool]) -> tuple[float, float]:
    mean = sum(right) / len(right)
    if len(right) < 2:
        return mean, math.nan
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1))
