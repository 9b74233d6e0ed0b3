"""The smallest models that have a head, and a loss's value and gradients on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.training.data.batches import IGNORED
from prodial_kernels.training.step.loss import ChunkedLoss


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class HeadOnly(nn.Module):
    """Hidden states are a parameter: a causal language model as the loss sees one."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        super().__init__()
        self.states = nn.Parameter(states)
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.lm_head.weight = nn.Parameter(weight)
        if bias is not None:
            self.lm_head.bias = nn.Parameter(bias)
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Output:
        states = self.states[:1, : input_ids.shape[1]] if len(input_ids) == 1 else self.states
        return Output(self.lm_head(states) * self.scale)


def labels_of(batch: int, length: int, vocabulary: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (batch, length))
    labels[0, :4] = IGNORED
    labels[-1, length // 2 :] = IGNORED
    return labels


def run(loss: Any, model: HeadOnly, labels: Tensor, weight: Any = 0.01) -> dict[str, Tensor]:
    """One forward and backward: the loss and every gradient."""
    model.zero_grad(set_to_none=True)
    value = loss(torch.zeros_like(labels), labels, weight)
    value.backward()
    gradients = {f"d_{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": value.detach(), **gradients}  # type: ignore[dict-item]


class Static(ChunkedLoss):
    """Computes every position, as in a CUDA graph."""

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Any = 1.0, *,
        every_position: bool = True, **inputs: Any,
    ) -> Any:  # fmt: skip
        return super().__call__(input_ids, labels, weight, every_position=True, **inputs)


def half_dtype(by_kernel: bool) -> torch.dtype:
    """The interpreter computes bf16 wrongly (triton-lang/triton#11584), so it sees fp16."""
    return torch.float16 if by_kernel else torch.bfloat16
