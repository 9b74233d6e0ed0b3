"""Tokens last or features last: which copies a layout costs, and the fast one where there is one.

Mamba-1's convolution and scan take [b, features, l]; the projectors take rows of features.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def transposed(x: Tensor) -> Tensor:
    """Return contiguous ``x.mT`` for x [b, rows, columns]."""
    if x.is_cuda and x.stride(2) == 1 and x.is_floating_point():
        from prodial_kernels.kernels.layout import launch_transpose

        return launch_transpose(x)
    return x.mT.contiguous()


def token_rows(x: Tensor) -> Tensor:
    """[b, l, K] of any strides -> [b · l, K] with unit inner stride, copied only where needed."""
    if x.ndim == 3 and x.stride(2) != 1 and x.stride(1) == 1 and x.shape[2] > 1:
        x = transposed(x.mT)
    return unit_stride_rows(x.reshape(-1, x.shape[-1]))


def unit_stride_rows(matrix: Tensor) -> Tensor:
    """Return ``matrix`` [M, K] with unit inner stride and rows that do not overlap."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    return matrix.contiguous()


def gated_tokens(out: Tensor, z: Tensor) -> Tensor:
    """``(out ⊙ silu(z))``, [b, E, l] with unit inner stride -> [b, l, E]: out_proj's input."""
    if out.is_cuda:
        from prodial_kernels.kernels.layout import launch_transpose

        return launch_transpose(out, z)
    return F.silu(z).mul_(out).mT
