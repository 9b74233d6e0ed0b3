"""From xz [b, 2E, l] to the gated scan output [b, E, l]: what Mamba-1 does between its projectors.

``silu(conv(x))``, x_proj, dt_proj, selective scan, gate, on the CUDA functions of causal-conv1d and
mamba-ssm, in the order of upstream's ``MambaInnerFn``. Forward and backward are plain functions for
the autograd functions of :mod:`.mamba1_block` and :mod:`.vim_scan`. Tensors stay [b, features, l],
so that B and C are views and nothing is transposed for x_proj and dt_proj. The output of the
convolution and delta are recomputed in backward, as upstream does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodial_kernels.kernels.projector.operands import Kept, Needs, Operands, ProjectionOptions
from prodial_kernels.models.mixers.cuda_functions import (
    convolve,
    convolve_backward,
    scan,
    scan_backward,
)
from prodial_kernels.models.mixers.projection import operands_of, placeholder
from prodial_kernels.ops.projection import project, project_backward

N_OPERANDS = len(Operands._fields)


class ScanOperands(NamedTuple):
    """The tensors of one scan.

    Attributes:
        conv_weight: [E, width].
        conv_bias: [E] or None.
        A: [E, N] fp32, negative.
        D: [E] fp32.
        dt_bias: [E] fp32, added to delta by the scan rather than by dt_proj.
        x_proj: [R + 2N, E].
        dt_proj: [E, R], without its bias.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    x_proj: Operands
    dt_proj: Operands

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return :data:`N_TENSORS` tensors, as ``Function.apply`` takes them."""
        return (*self[:5], *self.x_proj, *self.dt_proj)

    @classmethod
    def unflatten(cls, tensors: Sequence[Any]) -> ScanOperands:
        """Invert :meth:`flat`."""
        conv_weight, conv_bias, A, D, dt_bias, *inner = tensors
        x_proj, dt_proj = Operands(*inner[:N_OPERANDS]), Operands(*inner[N_OPERANDS:])
        return cls(conv_weight, conv_bias, A, D, dt_bias, x_proj, dt_proj)

    def split(self, dbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_proj's output [b, R + 2N, l] -> views dt [b, R, l], B and C [b, 1, N, l]."""
        rank, state = self.dt_proj.weight.shape[1], self.A.shape[1]
        dt, B, C = dbc.split([rank, state, state], dim=1)
        return dt, B.unsqueeze(1), C.unsqueeze(1)


N_TENSORS = 5 + 2 * N_OPERANDS


class ScanOptions(NamedTuple):
    """What of x_proj and dt_proj is not a tensor."""

    x_proj: ProjectionOptions
    dt_proj: ProjectionOptions


class ScanKept(NamedTuple):
    """What backward reads again: x_proj's output, the ungated scan output, the scan's states, H."""

    dbc: Tensor
    out: Tensor
    states: Tensor
    x_h: Tensor | None
    dt_h: Tensor | None


class ScanNeeds(NamedTuple):
    """Which gradients are asked for.

    Attributes:
        x_proj: Its ``x`` is the gradient towards the convolution's output, for what precedes it.
        dt_proj: Its ``x`` is the gradient towards x_proj's output.
        output: Whether any is, so that the gradient of the output is needed.
    """

    x_proj: Needs
    dt_proj: Needs
    output: bool

    @classmethod
    def of(cls, xz: bool, flags: Sequence[bool]) -> ScanNeeds:
        """Read ``needs_input_grad``: of xz, and of :meth:`ScanOperands.flat`."""
        own_x, own_dt = (flags[i : i + N_OPERANDS - 1] for i in (5, 5 + N_OPERANDS))
        u = xz or any(flags[:2])
        dbc = u or any(own_x)
        return cls(Needs(u, *own_x), Needs(dbc, *own_dt), dbc or any(own_dt) or any(flags[2:5]))


class Direction(NamedTuple):
    """Names of a scan's parts in a mixer, and whether it reads the sequence backwards."""

    conv1d: str
    x_proj: str
    dt_proj: str
    A_log: str
    D: str
    reverse: bool = False


FORWARD = Direction("conv1d", "x_proj", "dt_proj", "A_log", "D")
BACKWARD = Direction("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b", reverse=True)


def scan_operands(
    mixer: Any, tokens: Tensor, direction: Direction = FORWARD
) -> tuple[ScanOperands, ScanOptions]:
    """Return what :func:`scan_forward` takes beside xz.

    Args:
        mixer: Holds a depthwise convolution, two linear layers (adapted or not; the second has a
            bias), ``A_log`` [E, N] and ``D`` [E].
        tokens: [b, l, ·], of which only shape, dtype and device are read.
        direction: What these are called.
    """
    conv1d, x_proj, dt_proj, A_log, D = (getattr(mixer, name) for name in direction[:5])
    x_operands, x_options = operands_of(x_proj, placeholder(tokens, x_proj.in_features))
    dt_operands, dt_options = operands_of(dt_proj, placeholder(tokens, dt_proj.in_features))
    bias = None if conv1d.bias is None else conv1d.bias.contiguous()
    operands = ScanOperands(
        conv1d.weight.squeeze(1), bias, -torch.exp(A_log.float()), D.float().contiguous(),
        dt_proj.bias.float(), x_operands, dt_operands._replace(bias=None),
    )  # fmt: skip
    return operands, ScanOptions(x_options, dt_options)


def scan_forward(
    xz: Tensor, operands: ScanOperands, options: ScanOptions
) -> tuple[Tensor, ScanKept]:
    """Return the gated output [b, E, l], and what :func:`scan_gradients` takes back."""
    x, z = xz.chunk(2, dim=1)
    u = convolve(x, operands.conv_weight, operands.conv_bias)
    dbc, x_h = project(u.mT, operands.x_proj, options.x_proj, channel_first=True)
    dt, B, C = operands.split(dbc)
    delta, dt_h = project(dt.mT, operands.dt_proj, options.dt_proj, channel_first=True)
    out, states, y = scan(u, delta, operands.A, B, C, operands.D, z, operands.dt_bias, True)
    return y, ScanKept(dbc, out, states, x_h, dt_h)


def scan_gradients(
    given: list[Tensor],
    xz: Tensor,
    kept: ScanKept,
    operands: ScanOperands,
    options: ScanOptions,
    needs: ScanNeeds,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the gradients towards xz and towards :meth:`ScanOperands.flat`.

    Args:
        given: The gradient towards the gated output, and nothing else. It is taken out of the list,
            so that its memory is free once the scan has read it.
        xz: As in the forward, like ``operands`` and ``options``.
        kept: Of the forward.
        operands: As in the forward.
        options: As in the forward.
        needs: What to compute; the gradient of xz is undefined where it is not asked for.
    """
    dy = given.pop()
    x, z = xz.chunk(2, dim=1)
    u = convolve(x, operands.conv_weight, operands.conv_bias)
    dt, B, C = operands.split(kept.dbc)
    delta, _ = project(dt.mT, operands.dt_proj, options.dt_proj, channel_first=True)
    # Both halves in one tensor, which in_proj's backward takes.
    dxz = torch.empty_like(xz)
    dx, dz = dxz.chunk(2, dim=1)
    du, ddelta, dA, dB, dC, dD, d_dt_bias = scan_backward(
        u, delta, operands.A, B, C, operands.D, z, operands.dt_bias, dy, kept.states, kept.out, dz,
        True, False,
    )  # fmt: skip
    del dy
    ddt, *d_dt_proj = project_backward(
        ddelta.mT, dt.mT, Kept(delta.mT, kept.dt_h), operands.dt_proj, options.dt_proj,
        needs.dt_proj, channel_first=True,
    )  # fmt: skip
    del ddelta, delta
    d_x_proj: list[Tensor | None] = [None] * (N_OPERANDS - 1)
    if ddt is not None:
        ddbc = torch.empty_like(kept.dbc)
        for part, gradient in zip(operands.split(ddbc), (ddt, dB, dC), strict=True):
            part.copy_(gradient)
        _, *d_x_proj = project_backward(
            ddbc.mT, u.mT, Kept(kept.dbc.mT, kept.x_h), operands.x_proj, options.x_proj,
            needs.x_proj, channel_first=True, into=du,
        )  # fmt: skip
    d_conv_weight = d_conv_bias = None
    if needs.x_proj.x:
        d_conv_weight, d_conv_bias = convolve_backward(
            x, operands.conv_weight, operands.conv_bias, du, dx
        )
    tensors = (
        d_conv_weight, d_conv_bias, dA, dD, d_dt_bias, *d_x_proj, None, *d_dt_proj, None
    )  # fmt: skip
    return dxz, tensors
