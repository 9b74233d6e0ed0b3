"""One direction of a Vision Mamba mixer between its projectors: xz [b, 2E, l] -> y [b, E, l].

``silu(conv(x))``, x_proj, dt_proj, selective scan, gate: Mamba-1's block without ``in_proj`` and
``out_proj``, which Vim's two directions share. Two ways to compute it:

* on the CUDA functions of causal-conv1d and mamba-ssm, by :mod:`.scan_function`, which recomputes
  in backward what Vim's own function does (both directions keep the same xz, and flip it where
  needed);
* in PyTorch, on any device, differentiated by autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels._checks import check_choice
from prodial_kernels.models.mixers.cuda_functions import kernels_available
from prodial_kernels.models.mixers.projection import is_explicit
from prodial_kernels.models.mixers.scan_function import differentiable_scan
from prodial_kernels.models.mixers.selective_scan import Direction, scan_operands

SCANS = ("auto", "cuda", "torch")


def directed_scan(mixer: Any, xz: Tensor, direction: Direction, scan: str = "auto") -> Tensor:
    """Run one direction of ``mixer``; the output is in the order of the input.

    Args:
        mixer: Holds the parts that ``direction`` names: a depthwise convolution, two linear
            layers (adapted or not), ``A_log`` [E, N] and ``D`` [E].
        xz: [b, 2E, l], what ``in_proj`` returns, x above z.
        direction: Which parts, and which way.
        scan: ``"cuda"``, ``"torch"``, or ``"auto"``: ``"cuda"`` for tensors on a CUDA device,
            else ``"torch"``.

    Returns:
        [b, E, l], gated.

    Raises:
        RuntimeError: The CUDA functions are wanted and not installed.
        ValueError: An unknown ``scan``.
    """
    check_choice("scan", scan, SCANS)
    if scan == "torch" or (scan == "auto" and not xz.is_cuda):
        return _torch_scan(mixer, xz, direction)
    if not kernels_available():
        raise RuntimeError(
            "the selective scan on a CUDA device needs causal-conv1d and mamba-ssm; install them "
            '(pip install mamba-ssm causal-conv1d --no-build-isolation), or pass scan="torch", '
            "which is much slower"
        )
    for name in (direction.x_proj, direction.dt_proj):
        if not is_explicit(getattr(mixer, name)):
            raise ValueError(f'{name} has impl="reference", which only scan="torch" can run')
    operands, options = scan_operands(mixer, xz.mT, direction)
    xz = xz.to(operands.x_proj.weight.dtype)
    return differentiable_scan(xz, operands, options, reverse=direction.reverse)


def _torch_scan(mixer: Any, xz: Tensor, direction: Direction) -> Tensor:
    conv1d, dt_proj = getattr(mixer, direction.conv1d), getattr(mixer, direction.dt_proj)
    A_log, D = getattr(mixer, direction.A_log), getattr(mixer, direction.D)
    rank, state = dt_proj.in_features, A_log.shape[1]
    # The scan runs in fp32, as the CUDA function does, or wider.
    wide = torch.promote_types(torch.float32, xz.dtype)
    x, z = (xz.flip(-1) if direction.reverse else xz).chunk(2, dim=1)
    padded = F.pad(x, (conv1d.kernel_size[0] - 1, 0))
    u = F.silu(F.conv1d(padded, conv1d.weight, conv1d.bias, groups=conv1d.groups))
    dt, B, C = getattr(mixer, direction.x_proj)(u.mT).split([rank, state, state], dim=-1)
    delta = F.softplus(dt_proj(dt).mT.to(wide))
    y = selective_scan(u.to(wide), delta, -torch.exp(A_log.to(wide)), B.mT, C.mT)
    y = (y + D.to(wide)[:, None] * u) * F.silu(z.to(wide))
    y = y.to(u.dtype)
    return y.flip(-1) if direction.reverse else y


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``y_t = C_t · h_t`` with ``h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t``, differentiable.

    u and delta (Δ > 0) [b, E, l], A [E, N], B and C [b, N, l] -> y [b, E, l].
    """
    decay = torch.exp(delta[:, :, None] * A[:, :, None])
    states = _recurrence(decay, (delta * u)[:, :, None] * B[:, None])
    return (states * C[:, None]).sum(2)


def _recurrence(decay: Tensor, update: Tensor) -> Tensor:
    """``h_t = decay_t h_{t-1} + update_t`` along the last dimension, in about 2 √l steps.

    All chunks of length √l advance together; then what flows from chunk to chunk is added. Only
    products of decays occur, never quotients, so nothing overflows.
    """
    length = update.shape[-1]
    size = math.isqrt(max(length - 1, 0)) + 1
    padding = (0, -length % size)
    decays = F.pad(decay, padding, value=1.0).unflatten(-1, (-1, size)).unbind(-1)
    updates = F.pad(update, padding).unflatten(-1, (-1, size)).unbind(-1)
    inner, through = [updates[0]], [decays[0]]
    for factor, addend in zip(decays[1:], updates[1:], strict=True):
        inner.append(factor * inner[-1] + addend)
        through.append(factor * through[-1])
    carried = [torch.zeros_like(update[..., 0])]
    for factor, addend in zip(through[-1].unbind(-1), inner[-1].unbind(-1), strict=True):
        carried.append(factor * carried[-1] + addend)
    carry = torch.stack(carried[:-1], dim=-1)[..., None]
    states = torch.stack(inner, dim=-1) + torch.stack(through, dim=-1) * carry
    return states.flatten(-2)[..., :length]
