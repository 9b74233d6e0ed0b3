"""Tokens last or features last: which copies a layout costs, and the fast one where there is one.

Mamba-1's convolution and scan take [b, features, l]; the projectors take rows of features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def transposed(x: Tensor) -> Tensor:
    """Return contiguous ``x.mT`` for x [b, rows, columns]."""
    if _by_kernels(x) and x.stride(2) == 1 and x.is_floating_point():
        from prodial_kernels.kernels.layout import launch_transpose

        return launch_transpose(x)
    return x.mT.contiguous()


def lay_out(y: Tensor, channel_first: bool) -> Tensor:
    """[..., l, N] -> contiguous [..., N, l] where ``channel_first``, else ``y`` itself."""
    return y.transpose(-1, -2).contiguous() if channel_first else y


def token_matrix(x: Tensor, *, direct: bool = True) -> Tensor:
    """[..., l, F] of any strides -> the matrix of tokens that the kernels take.

    That is a view of ``x`` where there is one: [M, F] with unit inner stride, or, where
    ``direct``, channel-first [b, F, l] where the tokens lie side by side. Else it is a copy [M, F],
    by PyTorch's operators where autograd records them.
    """
    if x.ndim == 3 and x.shape[2] > 1 and x.stride(2) != 1 and x.stride(1) == 1:
        addressable = x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
        if direct and direct_length(x.shape[1]) and addressable and _rows_apart(x.mT):
            return x.mT
        if not (torch.is_grad_enabled() and x.requires_grad):
            x = transposed(x.mT)
    return unit_stride_rows(x.reshape(-1, x.shape[-1]))


def direct_length(length: int) -> bool:
    """Whether the kernels read and write sequences of this length channel-first.

    The copy engine needs rows of 16 bytes; where it cannot work, transposing is the faster way.
    """
    return length > 0 and length % 8 == 0


def unit_stride_rows(matrix: Tensor) -> Tensor:
    """Return [..., rows, columns] with unit inner stride and rows that do not overlap."""
    # The first question is the cheap one, and nearly always answered yes.
    return matrix if matrix.is_contiguous() or _rows_apart(matrix) else matrix.contiguous()


def _rows_apart(matrix: Tensor) -> bool:
    apart = all(
        matrix.stride(axis) >= matrix.shape[axis + 1] * matrix.stride(axis + 1)
        for axis in range(matrix.ndim - 1)
    )
    return matrix.stride(-1) == 1 and apart


def gated_channels(out: Tensor, z: Tensor) -> Tensor:
    """``out ⊙ silu(z)``, [b, E, l] with unit inner stride -> contiguous [b, E, l]."""
    if _by_kernels(out):
        from prodial_kernels.kernels.layout import launch_gate

        return launch_gate(out, z)
    return F.silu(z).mul_(out)


def _by_kernels(x: Tensor) -> bool:
    """Whether to launch a kernel, which torch.compile cannot trace; it writes such by itself."""
    return x.is_cuda and not torch.compiler.is_compiling()
