"""Batches for language modelling in which no document sees another one.

Windows of a stream (``packing.py``) let the state run from a document into the next, with only EOS
between them. Here every document is a sequence of its own. Short ones share a window where the
model keeps them apart (``models/layers/packed_rows.py``), so that hardly anything is padded; else
each is padded by itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prodial_kernels.models.layers.packed_rows import POSITIONS
from prodial_kernels.training.data.batches import (
    IGNORED,
    Batch,
    BatchSizes,
    EpochOrder,
    TrainingBatches,
)
from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.padding import PaddedBatches
from prodial_kernels.training.data.tokenization import EncodedPair, encode_documents, eos_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SharedWindows(TrainingBatches):
    """Whole documents side by side in windows of one length, marked by ``seq_idx``.

    Which documents share a window is decided once, by best fit; the windows come in a new random
    order every epoch. A window's end that no document fits is padding, without labels.

    A batch has int64 ``[batch_size, seq_len]`` twice, and ``seq_idx``, int32 of that shape, and
    where it is asked for ``position_ids``. A document's first token is no label: what precedes it
    is another document's.
    """

    def __init__(
        self,
        pieces: Sequence[Tensor],
        sizes: BatchSizes,
        notes: Sequence[str] = (),
        *,
        positions: bool = False,
    ) -> None:
        """Put pieces into windows.

        Args:
            pieces: int32 ``[n]`` each, 2 to ``seq_len`` tokens.
            sizes: Of windows and batches.
            notes: What to say of the pieces.
            positions: Give each token's place in its document too.

        Raises:
            DataError: No pieces.
        """
        if not pieces:
            raise DataError("there are no documents of two or more tokens to train on")
        self._pieces = list(pieces)
        self._positions = positions
        self._windows = best_fit([len(piece) for piece in pieces], sizes.seq_len)
        self._order = EpochOrder(len(self._windows), sizes.seed)
        super().__init__(
            sizes, sequences=len(self._windows), tokens=sum(map(len, pieces)), notes=notes
        )

    def _identity(self) -> tuple[str, tuple[object, ...], tuple[Tensor, ...]]:
        lengths = torch.tensor([len(piece) for piece in self._pieces])
        # Written only where it says something, so that runs begun without it can be continued.
        options = ("position_ids",) if self._positions else ()
        return "shared", options, (torch.cat(self._pieces), lengths)

    def _batch(self, step: int) -> Batch:
        shape = (self.sizes.batch_size, self.sizes.seq_len)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        seq_idx = torch.zeros(shape, dtype=torch.int32)
        positions = torch.zeros(shape, dtype=torch.int64) if self._positions else None
        for row in range(shape[0]):
            at = 0
            window = self._windows[self._order.index(step * shape[0] + row)]
            for place, index in enumerate(window):
                ids = self._pieces[index].long()
                end = at + len(ids)
                input_ids[row, at:end] = ids
                labels[row, at + 1 : end] = ids[1:]
                # Padding belongs to the last document, behind all of it.
                seq_idx[row, at:] = place
                if positions is not None:
                    positions[row, at:] = torch.arange(shape[1] - at)
                at = end
        return Batch(input_ids, labels, seq_idx, positions)


def separate_documents(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sizes: BatchSizes,
    *,
    apart: Collection[str] = (),
) -> SharedWindows | PaddedBatches:
    """Make batches of documents that do not see each other.

    Each document ends with EOS (and begins with BOS, if the model does); one longer than
    ``seq_len`` is cut into pieces, which do not see each other either.

    Args:
        documents: Texts.
        tokenizer: Has an EOS token.
        sizes: Of sequences and batches.
        apart: What keeps documents of one window apart in the model (``arguments_apart`` in
            ``models/layers/packed_rows.py``); if nothing does, each is padded by itself.

    Raises:
        DataError: No text, or a tokenizer without an EOS token.
    """
    seq_len = sizes.seq_len
    cut = [ids.split(seq_len) for ids in encode_documents(tokenizer, documents)]
    # One token has nothing to learn.
    pieces = [piece for parts in cut for piece in parts if len(piece) > 1]
    notes = [f"no text sees another one, each is ended by {tokenizer.eos_token!r}"]
    longer = sum(len(parts) > 1 for parts in cut)
    if longer:
        notes.append(
            f"{longer:,} of {len(cut):,} texts were longer than seq_len {seq_len} and were cut "
            "into pieces that do not see each other"
        )
    if apart:
        return SharedWindows(pieces, sizes, notes, positions=POSITIONS in apart)
    pairs = [EncodedPair(piece[:1], piece[1:]) for piece in pieces]
    return PaddedBatches(pairs, sizes, pad_token=eos_token(tokenizer), notes=notes)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few bins as best fit, longest first, needs; return indices by bin.

    ValueError for an item that is longer than ``capacity``.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"lengths must be at most {capacity}, got {max(lengths)}")
    bins: list[list[int]] = []
    # (space left, bin), sorted.
    open_bins: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(open_bins, (lengths[index], -1))
        if place < len(open_bins):
            space, chosen = open_bins.pop(place)
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if space > lengths[index]:
            insort(open_bins, (space - lengths[index], chosen))
    return bins
