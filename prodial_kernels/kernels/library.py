"""The large products in fp32, which cuBLAS sums more exactly, and faster, than ``tl.dot``."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens per slice of the recomputed U Wᵀ: bounds the temporary to [4096, N].
SCALE_SLICE = 4096


def library_forward(
    x: Tensor, v: Tensor, b: Tensor | None, h: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return ``X Vᵀ + H B'ᵀ + bias``, [M, N].

    X [M, K], V [N, K], B' [N, R_PAD], H [M, R_PAD].
    """
    y = torch.mm(x, v.T) if bias is None else torch.addmm(bias.to(x.dtype), x, v.T)
    if b is not None and h is not None:
        y.addmm_(h, b.T)
    return y


def library_scale_gradient(dy: Tensor, x: Tensor, wd: Tensor) -> Tensor:
    """Return ds = Σ_m dY ⊙ (X (W D_b)ᵀ), [N], for dY [M, N], X [M, K], W D_b [N, K].

    The division form of the 16-bit plan costs fp32 a few units in the last place.
    """
    ds = torch.zeros(dy.shape[1], dtype=dy.dtype, device=dy.device)
    for start in range(0, dy.shape[0], SCALE_SLICE):
        rows = slice(start, start + SCALE_SLICE)
        ds += torch.mm(x[rows], wd.T).mul_(dy[rows]).sum(0)
    return ds
