"""Tokens that are trained: themselves, or a small network that gives them.

With the network, token i is ``W₂ tanh(W₁ eᵢ + b₁) + b₂`` (as PEFT's prefix encoder has it). e, W₁
and b₁ are one for all that share it; W₂ and b₂ belong to whom the token is for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.models.methods.base import ADDED, added


def drawn_embedding(like: Tensor, count: int, features: int) -> Tensor:
    """N(0, 1), [count, features], where ``like`` is and as wide as what is trained."""
    return torch.randn(count, features, device=like.device, dtype=_wide(like))


def drawn_linear(like: Tensor, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias of a linear layer, as ``nn.Linear`` draws them."""
    bound = inputs**-0.5
    options: Any = {"device": like.device, "dtype": _wide(like)}
    weight = torch.empty(outputs, inputs, **options).uniform_(-bound, bound)
    return weight, torch.empty(outputs, **options).uniform_(-bound, bound)


def names(kind: str, *parts: str) -> tuple[str, ...]:
    """Return the names of parameters of a method."""
    return tuple(f"{ADDED}{kind}_{part}" for part in parts)


def encoded(owner: Any, kind: str) -> Tensor:
    """``tanh(W₁ e + b₁)``, [k, hidden], of the network in ``owner``."""
    embedding, weight, bias = (added(owner, name) for name in names(kind, "embedding", "w1", "b1"))
    if embedding is None or weight is None:
        raise RuntimeError(f"the network of {kind}-tuning is gone from the model")
    return torch.tanh(F.linear(embedding, weight, bias))


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
