"""One direction of a Vision Mamba mixer between its projectors: xz [b, 2E, l] -> y [b, E, l].

``silu(conv(x))``, x_proj, dt_proj, selective scan, gate: Mamba-1's block without ``in_proj`` and
``out_proj``, which Vim's two directions share. Two ways to compute it:

* on the CUDA functions of causal-conv1d and mamba-ssm, as one autograd function that keeps xz (of
  which both directions keep the same tensor, flipped where needed), x_proj's output, the ungated
  scan output and the scan's states, and recomputes the rest, as Vim's own function does;
* in PyTorch, on any device, differentiated by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.kernels.projector.operands import (
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.models.mixers.cuda_functions import (
    convolve,
    convolve_backward,
    kernels_available,
    scan_backward,
)
from prodial_kernels.models.mixers.cuda_functions import scan as cuda_scan
from prodial_kernels.models.mixers.projection import is_explicit, operands_of, placeholder
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.projection import project, project_backward

SCANS = ("auto", "cuda", "torch")


@dataclass(frozen=True)
class Direction:
    """Names of one direction's parts in a mixer, and whether it reads the sequence backwards."""

    conv1d: str
    x_proj: str
    dt_proj: str
    A_log: str
    D: str
    reverse: bool


FORWARD = Direction("conv1d", "x_proj", "dt_proj", "A_log", "D", reverse=False)
BACKWARD = Direction("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b", reverse=True)


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
    if scan not in SCANS:
        raise ValueError(f"scan must be one of {SCANS}, got {scan!r}")
    if scan == "torch" or (scan == "auto" and not xz.is_cuda):
        return _torch_scan(mixer, xz, direction)
    if not kernels_available():
        raise RuntimeError(
            "the selective scan on a CUDA device needs causal-conv1d and mamba-ssm; install them "
            '(pip install mamba-ssm causal-conv1d --no-build-isolation), or pass scan="torch", '
            "which is much slower"
        )
    conv1d, x_proj, dt_proj = (
        getattr(mixer, name) for name in (direction.conv1d, direction.x_proj, direction.dt_proj)
    )
    for name, layer in ((direction.x_proj, x_proj), (direction.dt_proj, dt_proj)):
        if not is_explicit(layer):
            raise ValueError(f'{name} has impl="reference", which only scan="torch" can run')
    tokens = xz.mT
    x_operands, x_options = operands_of(x_proj, placeholder(tokens, x_proj.in_features))
    dt_operands, dt_options = operands_of(dt_proj, placeholder(tokens, dt_proj.in_features))
    return _DirectedScan.apply(
        xz.to(x_operands.weight.dtype),
        Options(x_options, dt_options),
        direction.reverse,
        conv1d.weight.squeeze(1),
        conv1d.bias,
        -torch.exp(getattr(mixer, direction.A_log).float()),
        getattr(mixer, direction.D).float().contiguous(),
        dt_proj.bias.float(),
        *x_operands,
        # The scan adds the bias of delta.
        *dt_operands._replace(bias=None),
    )


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

    Args:
        u: [b, E, l].
        delta: Δ > 0, [b, E, l].
        A: [E, N].
        B: [b, N, l].
        C: [b, N, l].

    Returns:
        [b, E, l].
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


class Options(NamedTuple):
    """What of the two inner projections is not a tensor."""

    x_proj: ProjectionOptions
    dt_proj: ProjectionOptions


_FIRST = 8
_OPERANDS = len(Operands._fields)


class _DirectedScan(torch.autograd.Function):
    """xz [b, 2E, l] -> y [b, E, l]. See the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        xz: Tensor,
        options: Options,
        reverse: bool,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        *projections: Tensor | None,
    ) -> Tensor:
        """``projections`` are the ``Operands`` of x_proj and of dt_proj."""
        x_proj, dt_proj = _split(projections)
        with autocast_off(xz.device.type):
            # The same tensor for both directions; upstream keeps a flipped copy for the second.
            kept = xz
            x, z = _oriented(xz, reverse).chunk(2, dim=1)
            u = convolve(x, conv_weight, conv_bias)
            dbc, x_h = project(u.mT, x_proj, options.x_proj, channel_first=True)
            dt, B, C = _parts(dbc, dt_proj, A)
            delta, dt_h = project(dt.mT, dt_proj, options.dt_proj, channel_first=True)
            out, states, y = cuda_scan(u, delta, A, B, C, D, z, dt_bias, True)
        ctx.save_for_backward(
            kept, dbc, out, states, x_h, dt_h, conv_weight, conv_bias, A, D, dt_bias, *projections
        )
        ctx.options, ctx.reverse = options, reverse
        return y.flip(-1) if reverse else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        (kept, dbc, out, states, x_h, dt_h, conv_weight, conv_bias, A, D, dt_bias,
         *projections) = ctx.saved_tensors  # fmt: skip
        x_proj, dt_proj = _split(projections)
        needs = ctx.needs_input_grad
        own_x, own_dt = needs[_FIRST : _FIRST + _OPERANDS - 1], needs[_FIRST + _OPERANDS : -1]
        through_u = needs[0] or needs[3] or needs[4]
        with autocast_off(kept.device.type):
            xz = _oriented(kept, ctx.reverse)
            x, z = xz.chunk(2, dim=1)
            u = convolve(x, conv_weight, conv_bias)
            dt, B, C = _parts(dbc, dt_proj, A)
            delta, _ = project(dt.mT, dt_proj, ctx.options.dt_proj, channel_first=True)
            dxz = torch.empty_like(xz)
            dx, dz = dxz.chunk(2, dim=1)
            du, ddelta, dA, dB, dC, dD, d_dt_bias = scan_backward(
                u, delta, A, B, C, D, z, dt_bias, _oriented(dy, ctx.reverse), states, out, dz,
                True, False,
            )  # fmt: skip
            through_dt = bool(through_u or any(own_x))
            ddt, *d_dt_proj = project_backward(
                ddelta.mT, dt.mT, Kept(delta.mT, dt_h), dt_proj, ctx.options.dt_proj,
                Needs(through_dt, *own_dt), channel_first=True,
            )  # fmt: skip
            d_x_proj: list[Tensor | None] = [None] * (_OPERANDS - 1)
            d_conv_weight = d_conv_bias = None
            if ddt is not None:
                ddbc = torch.cat([ddt, dB[:, 0].to(ddt.dtype), dC[:, 0].to(ddt.dtype)], dim=1)
                _, *d_x_proj = project_backward(
                    ddbc.mT, u.mT, Kept(dbc.mT, x_h), x_proj, ctx.options.x_proj,
                    Needs(through_u, *own_x), channel_first=True, into=du,
                )  # fmt: skip
            if through_u:
                d_conv_weight, d_conv_bias = convolve_backward(x, conv_weight, conv_bias, du, dx)
            d_xz = (dxz.flip(-1) if ctx.reverse else dxz) if needs[0] else None
        gradients = (
            d_xz, None, None, d_conv_weight, d_conv_bias, dA, dD, d_dt_bias,
            *d_x_proj, None, *d_dt_proj, None,
        )  # fmt: skip
        return tuple(
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )


def _split(projections: tuple[Any, ...] | list[Any]) -> tuple[Operands, Operands]:
    return Operands(*projections[:_OPERANDS]), Operands(*projections[_OPERANDS:])


def _oriented(tensor: Tensor, reverse: bool) -> Tensor:
    """The tensor in the direction of the scan, contiguous along it."""
    # flip keeps the order of the strides.
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.flip(-1) if reverse else tensor


def _parts(dbc: Tensor, dt_proj: Operands, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_proj's output [b, R + 2N, l] -> views dt [b, R, l], B and C [b, 1, N, l]."""
    rank, state = dt_proj.weight.shape[1], A.shape[1]
    dt, B, C = dbc.split([rank, state, state], dim=1)
    return dt, B.unsqueeze(1), C.unsqueeze(1)
