"""Log-likelihoods of tokens under a causal language model: what every evaluation is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels.models.layers.head import HeadError, eval_mode, find_head, run_model
from prodial_kernels.training.data.batches import check_sizes
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.tokenization import prefix_token
from prodial_kernels.training.distributed.world import ONE_PROCESS, World
from prodial_kernels.training.step.loss import negative_log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


class EvaluationError(RuntimeError):
    """An evaluation cannot be carried out or its result has no meaning."""


class Window(NamedTuple):
    """Consecutive tokens, int ``[n]``, of which the last ``n_scored`` (< n) are scored."""

    tokens: Tensor
    n_scored: int


def windows(context: Tensor, continuation: Tensor, seq_len: int) -> Iterator[Window]:
    """Cut a continuation into windows that score each of its tokens exactly once.

    The model reads at most ``seq_len`` tokens for a window. Each window scores up to ``seq_len``
    further tokens, and reads as much of what comes before its first scored one as still fits (at
    least one token). With a context of one token this is the rolling log-likelihood of
    lm-evaluation-harness; with a continuation that fits, its truncation from the left.

    Args:
        context: int ``[n >= 1]``; read, never scored.
        continuation: int ``[m]``.
        seq_len: The most tokens that the model reads at once.

    Yields:
        Windows of at most ``seq_len + 1`` tokens.
    """
    tokens = torch.cat([context, continuation])
    for start in range(len(context), len(tokens), seq_len):
        end = min(start + seq_len, len(tokens))
        yield Window(tokens[max(0, end - seq_len - 1) : end], end - start)


def cut_by(context: Tensor, continuation: Tensor, seq_len: int) -> bool:
    """Whether :func:`windows` leaves out a part of the context, which is more than one token."""
    return len(context) > 1 and len(context) + len(continuation) > seq_len + 1


@dataclass(frozen=True)
class Scorer:
    """A model, and how it is run to score texts.

    Attributes:
        model: Maps ``input_ids [batch, length]`` to an object with ``logits
            [batch, length, vocabulary]``, as causal language models of transformers do.
        tokenizer: Its tokenizer.
        seq_len: The most tokens that the model reads at once.
        batch_size: Windows in a forward pass.
        device: Where to put the inputs; by default where the model's first parameter is.
        progress: Called after each forward pass with (windows done, windows in all).
        world: The processes that share the forward passes: each makes the same calls, and each
            gets what one alone would compute, bit for bit.

    Raises:
        ValueError: A size is less than 1.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    seq_len: int = 512
    batch_size: int = 8
    device: torch.device | str | None = None
    progress: OnProgress | None = None
    world: World = ONE_PROCESS

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes({"seq_len": (self.seq_len, 1), "batch_size": (self.batch_size, 1)})

    @torch.inference_mode()
    def log_likelihoods(self, scored: Sequence[Window]) -> Tensor:
        """Sum the log-likelihoods of each window's scored tokens.

        Windows are grouped by length, longest first, and padded on the right, where padding cannot
        reach the tokens before it (see ``padding.py``). The model runs in eval mode and gets its
        modes back. Only the logits of scored tokens are made, some hundred at a time, where the
        model's head can be taken out (see ``head.py``).

        Returns:
            float64 ``[len(scored)]`` on the CPU, in nats.

        Raises:
            DataError: A token is outside the model's vocabulary, or the tokenizer has neither BOS
                nor EOS.
            EvaluationError: A log-likelihood is not finite.
            PeerError: Another process failed.
        """
        model = self.model
        device = next(model.parameters()).device if self.device is None else self.device
        pad_token = prefix_token(self.tokenizer)
        _check_vocabulary(model, scored)
        sums = torch.zeros(len(scored), dtype=torch.float64)
        order = sorted(range(len(scored)), key=lambda i: -len(scored[i].tokens))
        score = _scorer(model)
        starts = range(0, len(order), self.batch_size)
        rank, size = self.world.rank, self.world.size
        done: dict[int, float] = {}
        with eval_mode(model):
            for first in range(0, len(starts), size):
                # The last one again rather than none: a divided model runs in all or in none.
                start = starts[min(first + rank, len(starts) - 1)]
                rows = order[start : start + self.batch_size]
                inputs = torch.full((len(rows), len(scored[rows[0]].tokens) - 1), pad_token)
                for target, row in enumerate(rows):
                    tokens = scored[row].tokens
                    inputs[target, : len(tokens) - 1] = tokens[:-1]
                found = score(inputs.to(device), [scored[row] for row in rows])
                done.update(zip(rows, found.tolist(), strict=True))
                if self.progress is not None:
                    self.progress(min(start + size * len(rows), len(order)), len(order))
        for of_one in self.world.gather(list(done.items())):
            for row, value in of_one:
                sums[row] = value
        if not torch.isfinite(sums).all():
            raise EvaluationError(
                f"{int((~torch.isfinite(sums)).sum())} of {len(sums)} log-likelihoods are not "
                "finite: the model's weights or activations have overflowed; check the training "
                "loss and the dtype"
            )
        return sums


def _scorer(model: nn.Module) -> Callable[[Tensor, Sequence[Window]], Tensor]:
    """Return what sums the log-likelihoods of windows that the rows of ``input_ids`` hold."""
    try:
        head = find_head(model)
    except HeadError:
        head = None

    def score(input_ids: Tensor, scored: Sequence[Window]) -> Tensor:
        rows = run_model(model, input_ids).logits if head is None else head.hidden(input_ids)
        # One window at a time: the logits of a whole batch in float32 can outgrow the model.
        sums = []
        for row, window in zip(rows, scored, strict=True):
            end = len(window.tokens) - 1
            predicting = row[end - window.n_scored : end]
            targets = window.tokens[-window.n_scored :].long().to(row.device)
            if head is None:
                losses = functional.cross_entropy(predicting.float(), targets, reduction="none")
            else:
                losses = negative_log_likelihoods(head, predicting, targets)
            sums.append(-losses.double().sum())
        return torch.stack(sums).cpu()

    return score


def _check_vocabulary(model: nn.Module, scored: Sequence[Window]) -> None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    highest = max((int(window.tokens.max()) for window in scored), default=0)
    if size is not None and highest >= size:
        raise DataError(
            f"token {highest} is outside the model's vocabulary of {size}; the tokenizer belongs "
            "to another model"
        )
