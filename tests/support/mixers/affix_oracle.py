"""Affix-tuning of a Mamba-1 or Vim mixer by its definition, in plain PyTorch.

Every direction gets a sequence of its own, with its tokens in it, which it scans token by token;
what comes out at the tokens' places is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def affix_by_definition(
    mixer: Any, hidden: Tensor, tokens: Sequence[Tensor], position: str, directions: int
) -> Tensor:
    """[b, l, d] -> [b, l, d].

    Args:
        mixer: Plain; the parts of its second direction end in ``_b``.
        hidden: Its input.
        tokens: Of each direction, [k, 2E].
        position: ``"prefix"``, ``"suffix"`` or ``"infix"``.
        directions: 1 or 2; of two, the mean is taken.
    """
    xz = mixer.in_proj(hidden)
    total = torch.zeros_like(xz[..., : xz.shape[-1] // 2])
    for direction in range(directions):
        sequence, kept = _with_tokens(xz, tokens[direction], position, direction)
        suffix = "_b" if direction else ""
        y = _scanned(mixer, sequence, suffix)
        y = y[:, kept]
        total = total + (y.flip(1) if direction else y)
    return mixer.out_proj(total / directions)


def own_tokens(module: nn.Module, mlp: bool) -> Tensor:
    """[sets, k, features], of a model whose only layer is the mixer ``0``."""
    own = dict(module.named_parameters())
    if not mlp:
        return own["0.prodial_added_affix_tokens"]
    names = ("embedding", "w1", "b1")
    e, w1, b1 = (own[f"prodial_added_affix_{name}"] for name in names)
    w2, b2 = (own[f"0.prodial_added_affix_{name}"] for name in ("w2", "b2"))
    return torch.tanh(e @ w1.T + b1) @ w2.mT + b2[:, None]


def _with_tokens(
    xz: Tensor, tokens: Tensor, position: str, direction: int
) -> tuple[Tensor, list[int]]:
    """The sequence that a direction reads, in its order, and where its own tokens are in it."""
    k, length = len(tokens), xz.shape[1]
    spread = tokens.expand(len(xz), -1, -1)
    if position == "infix":
        parts: list[Tensor] = []
        kept: list[int] = []
        for i, piece in enumerate(torch.tensor_split(xz, k + 1, dim=1)):
            first = sum(part.shape[1] for part in parts)
            kept += range(first, first + piece.shape[1])
            parts += [piece, *([spread[:, i : i + 1]] if i < k else [])]
        sequence = torch.cat(parts, dim=1)
        if direction:
            last = sequence.shape[1] - 1
            return sequence.flip(1), [last - place for place in reversed(kept)]
        return sequence, kept
    own = xz.flip(1) if direction else xz
    if position == "suffix" and not direction:
        return own, list(range(length))
    return torch.cat([spread, own], dim=1), list(range(k, k + length))


def _scanned(mixer: Any, sequence: Tensor, suffix: str) -> Tensor:
    """The gated scan of [b, l, 2E], token by token: [b, l, E]."""
    conv, x_proj, dt_proj = (
        getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj")
    )
    A, D = -torch.exp(getattr(mixer, f"A{suffix}_log")), getattr(mixer, f"D{suffix}")
    u, z = sequence.chunk(2, dim=-1)
    width = conv.kernel_size[0]
    padded = F.pad(u.mT, (width - 1, 0))
    outputs = []
    state = u.new_zeros(len(u), *A.shape)
    for t in range(u.shape[1]):
        v = (padded[..., t : t + width] * conv.weight[:, 0]).sum(-1)
        v = F.silu(v if conv.bias is None else v + conv.bias)
        dt, B, C = x_proj(v).split([dt_proj.in_features, A.shape[1], A.shape[1]], dim=-1)
        delta = F.softplus(dt_proj(dt))
        state = torch.exp(delta[..., None] * A) * state + (delta * v)[..., None] * B[:, None]
        outputs.append(((state * C[:, None]).sum(-1) + D * v) * F.silu(z[:, t]))
    return torch.stack(outputs, dim=1)
