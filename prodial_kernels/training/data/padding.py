"""Batches for prompt/completion and multiple choice: sequences of like length, padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prodial_kernels.training.data.batches import (
    IGNORED,
    Batch,
    BatchSizes,
    TrainingBatches,
    epoch_generator,
)
from prodial_kernels.training.data.examples import DataError, MultipleChoice, PromptCompletion
from prodial_kernels.training.data.tokenization import EncodedPair, encode_pairs, eos_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Batches are made of neighbours in length among this many batches' worth of random sequences:
# enough to leave little padding, few enough to keep batches random.
_BATCHES_SORTED_TOGETHER = 16
# Lengths are rounded up to this, so that kernels see few distinct shapes, all of them aligned.
_LENGTH_MULTIPLE = 8


class PaddedBatches(TrainingBatches):
    """Sequences grouped by length, in a new random order every epoch.

    Every sequence comes exactly once an epoch, so an epoch's last batch may be smaller. The plan
    of an epoch follows from ``(seed, epoch)``, so any step can be asked for without the ones
    before it. A batch is two int64 tensors ``[n, length]``, where ``n <= batch_size`` and
    ``length`` is the longest sequence's, rounded up to a multiple of 8.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        sizes: BatchSizes,
        *,
        pad_token: int,
        mask_prompt: bool = True,
        learned: Sequence[Tensor | None] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Cut pairs to length and keep them.

        A pair that is too long loses the start of its context, but never all of it; if the
        continuation alone is too long, its end is cut.

        Args:
            pairs: What to train on.
            sizes: Of sequences and batches.
            pad_token: Fills up short sequences; any valid id, since it is never learned.
            mask_prompt: Learn the continuations only.
            learned: Of each pair which of its tokens are learned, bool ``[n]``, where that is
                neither all nor the whole continuation; such a pair must not be too long.
            notes: What to say of the sequences, beside what is cut off them.

        Raises:
            DataError: No pairs.
        """
        if not pairs:
            raise DataError("there are no examples to train on")
        cut = [_cut(pair, sizes.seq_len) for pair in pairs]
        self._pad_token = pad_token
        self._tokens = torch.cat([ids for pair in cut for ids in pair])
        self._learned = torch.cat(
            [
                _learned(pair, mask_prompt) if mask is None else mask
                for pair, mask in zip_longest(cut, learned)
            ]
        )
        self._lengths = torch.tensor([len(c) + len(t) for c, t in cut])
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._plan: tuple[int, list[Tensor]] = (-1, [])
        super().__init__(
            sizes,
            sequences=len(pairs),
            tokens=len(self._tokens),
            notes=(*notes, *_losses(pairs, cut, sizes.seq_len)),
        )
        self.n_truncated = sum(len(c) + len(t) > sizes.seq_len for c, t in pairs)

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[PromptCompletion | MultipleChoice],
        tokenizer: PreTrainedTokenizerBase,
        sizes: BatchSizes,
        *,
        mask_prompt: bool = True,
    ) -> PaddedBatches:
        """Tokenise examples of one kind: completions end with EOS, of choices the right is learned.

        Completions whose prompts continue each other, as those of the turns of a conversation do
        where its template ends every turn with EOS, become one sequence if it is not too long:
        what is learned after what is the same, and no token is read twice.

        Choices get no EOS, because the likelihoods that decide the accuracy have none either.

        Raises:
            DataError: No examples, or a tokenizer without an EOS token.
        """
        eos = eos_token(tokenizer)
        completions = any(isinstance(example, PromptCompletion) for example in examples)
        texts = [
            (e.prompt, e.completion) if isinstance(e, PromptCompletion) else e.pair(e.label)
            for e in examples
        ]
        end = torch.tensor([eos] if completions else [], dtype=torch.int32)
        pairs = [
            EncodedPair(context, torch.cat([ids, end]))
            for context, ids in encode_pairs(tokenizer, texts)
        ]
        note = (
            f"each completion is ended by {tokenizer.eos_token!r}"
            if completions
            else "of each question the right choice is learned, without an end token"
        )
        if mask_prompt:
            note += "; what stands before it is read, not learned"
        pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        learned: list[Tensor | None] = []
        if mask_prompt and completions:
            pairs, learned = _joined(pairs, sizes.seq_len)
        return cls(
            pairs, sizes,
            pad_token=int(pad), mask_prompt=mask_prompt, learned=learned, notes=[note],
        )  # fmt: skip

    def _identity(self) -> tuple[str, tuple[object, ...], tuple[Tensor, ...]]:
        return "padded", (), (self._tokens, self._lengths, self._learned)

    def _batch(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._plan_of(epoch))
        rows = self._plan[1][place]
        length = -(-int(self._lengths[rows].max()) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        # Padding goes to the right. A recurrence has no attention mask to hide padding with: on
        # the left it would run through the state before the text does. On the right it comes
        # after every real token, so it cannot reach them, and without labels it is not learned.
        input_ids = torch.full((len(rows), length), self._pad_token)
        labels = torch.full_like(input_ids, IGNORED)
        for target, row in enumerate(rows.tolist()):
            start, n = int(self._starts[row]), int(self._lengths[row])
            ids = self._tokens[start : start + n].long()
            input_ids[target, :n] = ids
            labels[target, :n] = ids.masked_fill(~self._learned[start : start + n], IGNORED)
        return Batch(input_ids, labels)

    def _plan_of(self, epoch: int) -> list[Tensor]:
        generator = epoch_generator(self.sizes.seed, epoch)
        order = torch.randperm(len(self._lengths), generator=generator)
        batches: list[Tensor] = []
        batch_size = self.sizes.batch_size
        for group in order.split(batch_size * _BATCHES_SORTED_TOGETHER):
            by_length = group[self._lengths[group].argsort(stable=True)]
            batches.extend(by_length.split(batch_size))
        shuffled = torch.randperm(len(batches), generator=generator)
        return [batches[int(index)] for index in shuffled]


def _learned(pair: EncodedPair, mask_prompt: bool) -> Tensor:
    """Which tokens of a pair are learned: the continuation's, or all."""
    n = len(pair.context)
    mask = torch.ones(n + len(pair.continuation), dtype=torch.bool)
    if mask_prompt:
        mask[:n] = False
    return mask


def _joined(
    pairs: Sequence[EncodedPair], seq_len: int
) -> tuple[list[EncodedPair], list[Tensor | None]]:
    """Make one pair of neighbours of which each begins with all of the one before.

    Returns:
        The pairs, and of those that were made of several what of them is learned.
    """
    joined: list[EncodedPair] = []
    learned: list[Tensor | None] = []
    for pair in pairs:
        last = joined[-1] if joined else None
        before = 0 if last is None else len(last.context) + len(last.continuation)
        if (
            last is None
            or not before <= len(pair.context) <= seq_len - len(pair.continuation)
            or not torch.equal(pair.context[:before], torch.cat(last))
        ):
            joined.append(pair)
            learned.append(None)
            continue
        mask = _learned(pair, True)
        earlier = learned[-1]
        mask[:before] = _learned(last, True) if earlier is None else earlier
        joined[-1], learned[-1] = pair, mask
    return joined, learned


def _cut(pair: EncodedPair, seq_len: int) -> EncodedPair:
    continuation = pair.continuation[: seq_len - 1]
    return EncodedPair(pair.context[-(seq_len - len(continuation)) :], continuation)


def _losses(
    pairs: Sequence[EncodedPair], cut: Sequence[EncodedPair], seq_len: int
) -> Iterator[str]:
    """Say how many sequences were cut, and what they lost."""
    before = [(len(context), len(continuation)) for context, continuation in pairs]
    after = [(len(context), len(continuation)) for context, continuation in cut]
    both = list(zip(before, after, strict=True))
    longer = [sum(lengths) for lengths in before if sum(lengths) > seq_len]
    if not longer:
        return
    lost = {
        "the start of the prompt": sum(1 < new < old for (old, _), (new, _) in both),
        "all of the prompt but a token": sum(1 == new < old for (old, _), (new, _) in both),
        "the end of what is learned, with its end token": sum(
            new < old for (_, old), (_, new) in both
        ),
    }
    parts = ", ".join(f"{n:,} lost {what}" for what, n in lost.items() if n)
    yield (
        f"{len(longer):,} of {len(pairs):,} rows were longer than seq_len {seq_len} and were cut: "
        f"{parts}; a seq_len of {max(longer):,} holds all"
    )
