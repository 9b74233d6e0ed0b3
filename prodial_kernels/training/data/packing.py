"""Batches for language modelling: documents in a row, cut into windows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prodial_kernels.training.data.batches import Batch, BatchSizes, EpochOrder, TrainingBatches
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.tokenization import encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedBatches(TrainingBatches):
    """Windows of a token stream in a new random order every epoch; every batch has full size.

    An epoch's order follows from ``(seed, epoch)`` and a batch's windows from ``step``, so any
    step can be asked for without the ones before it. Sample ``i`` of the run is window ``i mod
    n_windows`` in the order of epoch ``i div n_windows``; a batch may span two epochs. A batch is
    two int64 tensors ``[batch_size, seq_len]``; every token is a label.
    """

    def __init__(self, tokens: Tensor, sizes: BatchSizes, notes: Sequence[str] = ()) -> None:
        """Cut a stream into windows; the last one is moved back to end on the last token.

        Args:
            tokens: int32 ``[n_tokens]``.
            sizes: Of windows and batches.
            notes: What to say of the stream.

        Raises:
            DataError: Fewer tokens than one window.
        """
        seq_len = sizes.seq_len
        if len(tokens) < seq_len:
            raise DataError(
                f"the training text has {len(tokens)} tokens, fewer than one window of {seq_len}; "
                f"give more text or set seq_len to at most {len(tokens)}"
            )
        starts = torch.arange(0, len(tokens) - seq_len + 1, seq_len)
        if len(tokens) % seq_len:
            # Some tokens of the last two windows come twice; none is left out, none is padding.
            starts = torch.cat([starts, torch.tensor([len(tokens) - seq_len])])
        self._tokens = tokens
        self._starts = starts
        self._order = EpochOrder(len(starts), sizes.seed)
        super().__init__(sizes, sequences=len(starts), tokens=len(tokens), notes=notes)

    @classmethod
    def from_documents(
        cls, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sizes: BatchSizes
    ) -> PackedBatches:
        """Join documents to one stream, each ended by EOS (and begun by BOS, if the model does).

        Raises:
            DataError: Too little text, or a tokenizer without an EOS token.
        """
        tokens = torch.cat(list(encode_documents(tokenizer, documents)))
        note = f"texts follow on each other in windows, each ended by {tokenizer.eos_token!r}"
        return cls(tokens, sizes, [note])

    def _identity(self) -> tuple[str, tuple[object, ...], tuple[Tensor, ...]]:
        return "packed", (), (self._tokens,)

    def _batch(self, step: int) -> Batch:
        n = self.sizes.batch_size
        starts = self._starts[[self._order.index(step * n + row) for row in range(n)]]
        input_ids = self._tokens[starts[:, None] + torch.arange(self.sizes.seq_len)].long()
        return Batch(input_ids, input_ids.clone())
