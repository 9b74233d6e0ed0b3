"""Language tasks for a model: batches of prompts with answers, and accuracy by likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.tasks.task import TextExample, TextTask

__all__ = ["LanguageData"]

_MULTIPLE = 16  # lengths are padded to it, so that kernels see few shapes


@dataclass
class LanguageData:
    """A task in tokens.

    Attributes:
        task: Whose examples.
        tokenizer: Of the base.
        max_length: Tokens of a prompt with a choice; longer prompts lose their beginning.
        device: Where batches are made.
    """

    task: TextTask
    tokenizer: Any
    max_length: int
    device: torch.device

    def __post_init__(self) -> None:
        """Tokenise the training split: its sequences are padded to one length."""
        examples = self.task.splits["train"]
        self._train = self._encode([(e.prompt, e.choices[e.answer]) for e in examples])
        longest = max(len(ids) for ids, _ in self._train)
        self.length = -(-longest // _MULTIPLE) * _MULTIPLE

    def __len__(self) -> int:
        return len(self._train)

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Ids of prompts with a choice each, and how many of them are the choice's."""
        ids: dict[str, list[int]] = {}
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        if texts:
            found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            ids = dict(zip(texts, found, strict=True))
        encoded = []
        for prompt, choice in pairs:
            answer = ids[choice][: self.max_length // 2]
            start = ids[prompt][-(self.max_length - 1 - len(answer)) :]
            encoded.append(([self.tokenizer.eos_token_id, *start, *answer], len(answer)))
        return encoded

    def batch(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids [b, length] and, at the place of each answer's token, its id (elsewhere -100)."""
        return self._padded([self._train[i] for i in index], self.length)

    def _padded(self, rows: Sequence[tuple[list[int], int]], length: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), -100)
        for i, (tokens, answer) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, len(tokens) - answer : len(tokens)] = torch.tensor(tokens[-answer:])
        return ids.to(self.device), labels.to(self.device)

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean nats a token of the answers."""
        ids, labels = batch
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())

    def choice_batches(
        self, examples: Sequence[TextExample], tokens_a_batch: int
    ) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]:
        """All choices of examples, those of like lengths together.

        Yields:
            ``(example, choice)`` of each row, ids and labels as :meth:`batch` gives them; no more
            than ``tokens_a_batch`` with the padding, but at least one row.
        """
        places = [(i, j) for i, example in enumerate(examples) for j in range(len(example.choices))]
        encoded = self._encode([(examples[i].prompt, examples[i].choices[j]) for i, j in places])
        flat = [(*place, *row) for place, row in zip(places, encoded, strict=True)]
        flat.sort(key=lambda row: len(row[2]))
        start = 0
        while start < len(flat):
            count = 1
            while start + count < len(flat):
                length = -(-len(flat[start + count][2]) // _MULTIPLE) * _MULTIPLE
                if length * (count + 1) > tokens_a_batch:
                    break
                count += 1
            rows = flat[start : start + count]
            length = -(-len(rows[-1][2]) // _MULTIPLE) * _MULTIPLE
            ids, labels = self._padded([(tokens, answer) for _, _, tokens, answer in rows], length)
            yield [(i, j) for i, j, _, _ in rows], ids, labels
            start += count

    @torch.no_grad()
    def accuracy(self, model: Any, split: str, limit: int = 0) -> float:
        """Share of a split's (first ``limit``) examples whose right choice is the likeliest."""
        examples = self.task.splits[split][: limit or None]
        # On a CPU, what stays in its caches.
        tokens_a_batch = 32768 if self.device.type == "cuda" else 1024
        scores: dict[tuple[int, int], float] = {}
        for rows, ids, labels in self.choice_batches(examples, tokens_a_batch):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
            ).view(len(rows), -1)
            for (i, j), total in zip(rows, nats.sum(1).tolist(), strict=True):
                size = len(examples[i].choices[j].encode()) if self.task.per_byte else 1
                scores[i, j] = -total / size
        right = 0
        for i, example in enumerate(examples):
            values = [scores[i, j] for j in range(len(example.choices))]
            right += max(range(len(values)), key=values.__getitem__) == example.answer
        return right / max(1, len(examples))
