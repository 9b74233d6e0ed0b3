"""Batches for language modelling: documents in a row, cut into windows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prodial_kernels.training.data.batches import Batch, EpochOrder, check_sizes, fingerprint
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.tokenization import encode, eos_token, leading_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedBatches:
    """Windows of a token stream in a new random order every epoch; every batch has full size.

    An epoch's order follows from ``(seed, epoch)`` and a batch's windows from ``step``, so any
    step can be asked for without the ones before it. Sample ``i`` of the run is window ``i mod
    n_windows`` in the order of epoch ``i div n_windows``; a batch may span two epochs.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        """Cut a stream into windows; the last one is moved back to end on the last token.

        Args:
            tokens: int32 ``[n_tokens]``.
            seq_len: Tokens in a window, at least 2.
            batch_size: Windows in a batch.
            seed: Decides the order of every epoch.
            notes: What to say of the stream.

        Raises:
            DataError: Fewer tokens than one window.
            ValueError: ``seq_len`` or ``batch_size`` is too small.
        """
        check_sizes({"seq_len": (seq_len, 2), "batch_size": (batch_size, 1)})
        if len(tokens) < seq_len:
            raise DataError(
                f"the training text has {len(tokens)} tokens, fewer than one window of {seq_len}; "
                f"give more text or set seq_len to at most {len(tokens)}"
            )
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.notes: Sequence[str] = tuple(notes)
        self.n_truncated = 0
        self._tokens = tokens
        starts = torch.arange(0, len(tokens) - seq_len + 1, seq_len)
        if len(tokens) % seq_len:
            # Some tokens of the last two windows come twice; none is left out, none is padding.
            starts = torch.cat([starts, torch.tensor([len(tokens) - seq_len])])
        self._starts = starts
        self._order = EpochOrder(len(starts), seed)
        self.steps_per_epoch = -(-len(starts) // batch_size)
        self.n_tokens = len(tokens)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
    ) -> PackedBatches:
        """Join documents to one stream, each ended by EOS (and begun by BOS, if the model does).

        Raises:
            DataError: Too little text, or a tokenizer without an EOS token.
            ValueError: A size is out of range.
        """
        before = torch.tensor(leading_tokens(tokenizer), dtype=torch.int32)
        after = torch.tensor([eos_token(tokenizer)], dtype=torch.int32)
        parts = [part for ids in encode(tokenizer, documents) for part in (before, ids, after)]
        note = f"texts follow on each other in windows, each ended by {tokenizer.eos_token!r}"
        return cls(
            torch.cat(parts), seq_len=seq_len, batch_size=batch_size, seed=seed, notes=[note]
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of data, sizes and seed: equal fingerprints mean equal batches at every step."""
        settings = ("packed", self.seq_len, self.batch_size, self.seed)
        return fingerprint(settings, self._tokens)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step.

        Args:
            step: From 0, without bound.

        Returns:
            Two int64 tensors ``[batch_size, seq_len]``; every token is a label.

        Raises:
            ValueError: The step is negative.
        """
        check_sizes({"step": (step, 0)})
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = self._starts[[self._order.index(sample) for sample in samples]]
        input_ids = self._tokens[starts[:, None] + torch.arange(self.seq_len)].long()
        return Batch(input_ids, input_ids.clone())
