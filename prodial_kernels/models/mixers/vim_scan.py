"""One direction of a Vision Mamba mixer between its projectors: xz [b, 2E, l] -> y [b, E, l].

``silu(conv(x))``, x_proj, dt_proj, selective scan, gate: Mamba-1's block without ``in_proj`` and
``out_proj``, which Vim's two directions share. Two ways to compute it:

* on the CUDA functions of causal-conv1d and mamba-ssm, by :mod:`.selective_scan`, as one autograd
  function that keeps xz (both directions keep the same tensor, and flip it where needed), x_proj's
  output, the ungated scan output and the scan's states, and recomputes the rest, as Vim's own
  function does;
* in PyTorch, on any device, differentiated by autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels._checks import check_choice
from prodial_kernels.models.mixers.cuda_functions import kernels_available
from prodial_kernels.models.mixers.projection import is_explicit
from prodial_kernels.models.mixers.selective_scan import (
    Direction,
    ScanKept,
    ScanNeeds,
    ScanOperands,
    ScanOptions,
    scan_forward,
    scan_gradients,
    scan_operands,
)
from prodial_kernels.ops.autocast import autocast_off

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
    return _DirectedScan.apply(xz, options, direction.reverse, *operands.flat())


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


class _DirectedScan(torch.autograd.Function):
    """xz [b, 2E, l] -> y [b, E, l]. See the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, options: ScanOptions, reverse: bool, *tensors: Tensor | None
    ) -> Tensor:
        """``tensors``: :meth:`ScanOperands.flat`."""
        operands = ScanOperands.unflatten(tensors)
        with autocast_off(xz.device.type):
            y, kept = scan_forward(_oriented(xz, reverse), operands, options)
        # xz itself, one tensor for both directions; upstream keeps a flipped copy for the second.
        ctx.save_for_backward(xz, *kept, *tensors)
        ctx.options, ctx.reverse = options, reverse
        return y.flip(-1) if reverse else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        xz, *tensors = ctx.saved_tensors
        kept = ScanKept(*tensors[: len(ScanKept._fields)])
        operands = ScanOperands.unflatten(tensors[len(ScanKept._fields) :])
        needs = ctx.needs_input_grad
        with autocast_off(xz.device.type):
            dxz, found = scan_gradients(
                [_oriented(dy, ctx.reverse)], _oriented(xz, ctx.reverse), kept, operands,
                ctx.options, ScanNeeds.of(needs[0], needs[3:]),
            )  # fmt: skip
            dxz = dxz.flip(-1) if ctx.reverse and needs[0] else dxz
        return tuple(
            gradient if needed else None
            for gradient, needed in zip((dxz, None, None, *found), needs, strict=True)
        )


def _oriented(tensor: Tensor, reverse: bool) -> Tensor:
    """The tensor in the direction of the scan, contiguous along it."""
    # flip keeps the order of the strides.
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.flip(-1) if reverse else tensor
