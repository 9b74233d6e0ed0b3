"""The network beside ``out_proj`` (ParallelAdapter), as Mamba-1's block computes it.

Its hidden layer reads the gated scan output where ``out_proj`` does, and backward takes the one
that is recomputed for ``out_proj``: nothing of the width of the model is kept for it. Kept is the
hidden layer, [b, r, l].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prodial_kernels.linear import ADDED, OFFSETS_OFF
from prodial_kernels.methods import ParallelAdapter
from prodial_kernels.ops.products import wide_product

DOWN, UP = f"{ADDED}parallel_a", f"{ADDED}parallel_b"
"""Names of A [r, E] and B [d, r] in ``out_proj``."""
OPTIONS = "_prodial_parallel_adapter"
"""The attribute of ``out_proj`` that holds the network's options."""


class Branch(NamedTuple):
    """The network's tensors, in the dtype of its input; all None where there is none.

    Attributes:
        down: A, [r, E].
        up: B with the scale, [d, r].
        kept: What dropout multiplies the hidden layer by, [b, r, l], or None.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    kept: Tensor | None = None


N_BRANCH = len(Branch._fields)


def branch_of(layer: nn.Module) -> tuple[Tensor, Tensor, ParallelAdapter] | None:
    """Return A, B and the options of the network beside ``layer``; None where it has none."""
    own = vars(layer)
    a, b = (own["_parameters"].get(name) for name in (DOWN, UP))
    if a is None or b is None or own.get(OFFSETS_OFF):
        return None
    return a, b, own[OPTIONS]


def branch_rank(layer: nn.Module) -> int:
    """Return the width of the network beside ``layer``; 0 where it has none."""
    found = branch_of(layer)
    return 0 if found is None else found[0].shape[0]


def branch_operands(layer: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Branch:
    """Return the tensors of the network beside ``layer``, and draw its dropout.

    Args:
        layer: ``out_proj``.
        tokens: [b, l, ·], of which only sizes and device are read.
        dtype: Of the network's input.
    """
    found = branch_of(layer)
    if found is None:
        return Branch()
    a, b, method = found
    kept = None
    if method.dropout and layer.training:
        batch, length = tokens.shape[:2]
        kept = tokens.new_empty(batch, a.shape[0], length, dtype=dtype)
        kept.bernoulli_(1 - method.dropout).div_(1 - method.dropout)
    return Branch(a.to(dtype), (b * method.scale).to(dtype), kept)


def add_branch(y: Tensor, gated: Tensor, branch: Branch) -> tuple[Tensor, Tensor | None]:
    """Add the network's output to y [b, l, d], in place; return y and the hidden layer."""
    down, up, kept = branch
    if down is None or up is None:
        return y, None
    hidden = torch.bmm(down.expand(len(gated), -1, -1), gated).relu_()
    if kept is not None:
        hidden.mul_(kept)
    return y.baddbmm_(hidden.mT, up.T.expand(len(y), -1, -1)), hidden


def branch_gradients(
    dy: Tensor, gated: Tensor, hidden: Tensor | None, branch: Branch, dgated: Tensor | None
) -> tuple[Any, Any, None]:
    """Return the gradients of :class:`Branch`; add the one towards its input to ``dgated``.

    Args:
        dy: Gradient of the block's output, [b, l, d].
        gated: The network's input, [b, E, l].
        hidden: The hidden layer, [b, r, l].
        branch: As in the forward.
        dgated: [b, E, l], contiguous; None where nothing before the network asks.
    """
    down, up, kept = branch
    if down is None or up is None or hidden is None:
        return None, None, None
    d_up = torch.einsum("bld,brl->dr", dy, hidden)
    d_hidden = torch.bmm(up.T.expand(len(dy), -1, -1), dy.mT)
    if kept is not None:
        d_hidden.mul_(kept)
    d_hidden.masked_fill_(hidden <= 0, 0)
    d_down = wide_product(d_hidden, gated.mT).sum(0).to(down.dtype)
    if dgated is not None:
        dgated.baddbmm_(down.T.expand(len(dy), -1, -1), d_hidden)
    return d_down, d_up, None
