"""Mamba-1's fused block with its projectors inside: one autograd function per mixer.

The order of the work is upstream's ``MambaInnerFn`` (convolution, x_proj, dt_proj, selective scan,
out_proj), on the same CUDA functions. What differs:

* ``in_proj`` and ``out_proj`` run adapted. The input of ``out_proj`` is not kept: it is
  ``out ⊙ silu(z)``, made again in backward, as upstream does for its own weight gradient.
* Only gradients that are asked for are computed; upstream forms the dense weight gradients of
  out_proj, x_proj and dt_proj in every backward.
* Everything stays [b, features, l], so that B and C are views and nothing is transposed for
  x_proj and dt_proj.

Kept: xz, x_proj's output, the ungated scan output, the scan's states, and either the block's input
X or its output Y. X is made again where the norm before the block allows it; then Y, of the same
size, is kept for the gradient of out_proj's scale, which else costs that product once more. The
convolution's output and delta are recomputed, as upstream does; with ``recompute_xz`` so are xz and
Y. What the backward of ``in_proj`` starts with is begun beside the product of ``out_proj`` and the
scan (``ops/ahead.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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
    scan,
    scan_backward,
)
from prodial_kernels.models.mixers.projection import operands_of, placeholder
from prodial_kernels.models.mixers.remade_norm import normed_again
from prodial_kernels.ops.ahead import Ahead
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.layout import gated_channels
from prodial_kernels.ops.projection import (
    has_work_ahead,
    project,
    project_backward,
    scaled_weight,
    takes_output,
)

MAMBA_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "A_log", "D")
"""What a Mamba-1 mixer consists of, and all that :func:`fused_mamba` computes with."""


class Options(NamedTuple):
    """What of the four projections is not a tensor."""

    in_proj: ProjectionOptions
    x_proj: ProjectionOptions
    dt_proj: ProjectionOptions
    out_proj: ProjectionOptions


class Keeping(NamedTuple):
    """What backward finds again without its being kept."""

    recompute_xz: bool
    hidden_again: Callable[[], Tensor] | None


def fused_mamba(mixer: Any, hidden: Tensor) -> Tensor:
    """Compute ``mixer(hidden)`` for a mamba_ssm ``Mamba``: [b, l, d] -> [b, l, d].

    Raises:
        RuntimeError, TypeError, ValueError: As from calling the projectors.
    """
    inner = mixer.conv1d.weight.shape[0]
    in_proj, in_options = operands_of(mixer.in_proj, hidden)
    x_proj, x_options = operands_of(mixer.x_proj, placeholder(hidden, inner))
    rank = mixer.dt_proj.in_features
    dt_proj, dt_options = operands_of(mixer.dt_proj, placeholder(hidden, rank))
    out_proj, out_options = operands_of(mixer.out_proj, placeholder(hidden, inner))
    bias = mixer.conv1d.bias
    hidden = hidden.to(in_proj.weight.dtype)
    return MambaBlock.apply(
        hidden,
        Options(in_options, x_options, dt_options, out_options),
        Keeping(getattr(mixer, RECOMPUTE_XZ, False), normed_again(hidden)),
        mixer.conv1d.weight.squeeze(1),
        None if bias is None else bias.contiguous(),
        -torch.exp(mixer.A_log.float()),
        mixer.D.float().contiguous(),
        mixer.dt_proj.bias.float(),
        *in_proj,
        *x_proj,
        # The scan adds the bias of delta.
        *dt_proj._replace(bias=None),
        *out_proj,
    )


RECOMPUTE_XZ = "prodial_recompute_xz"
"""Attribute of a mixer; True trades a product of each projector per step for memory: xz, and Y."""


class MambaBlock(torch.autograd.Function):
    """X [b, l, d] -> Y [b, l, d]. See the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        options: Options,
        keeping: Keeping,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        *projections: Tensor | None,
    ) -> Tensor:
        """Tensors as upstream's; ``projections`` are the ``Operands`` of the four, in order."""
        in_proj, x_proj, dt_proj, out_proj = _split(projections)
        with autocast_off(hidden.device.type):
            xz, in_h = project(hidden, in_proj, options.in_proj, channel_first=True)
            x, z = xz.chunk(2, dim=1)
            u = convolve(x, conv_weight, conv_bias)
            dbc, x_h = project(u.mT, x_proj, options.x_proj, channel_first=True)
            dt, B, C = _parts(dbc, dt_proj, A)
            delta, dt_h = project(dt.mT, dt_proj, options.dt_proj, channel_first=True)
            out, states, gated = scan(u, delta, A, B, C, D, z, dt_bias, True)
            del u, delta
            y, out_h = project(gated.mT, out_proj, options.out_proj)
            del gated
        again = keeping.hidden_again
        keeps_y = (
            again is not None
            and not keeping.recompute_xz
            and takes_output(out_proj, options.out_proj)
            and ctx.needs_input_grad[_SCALE_OF_OUT_PROJ]
        )
        ctx.save_for_backward(
            hidden if again is None else None, None if keeping.recompute_xz else xz, dbc, out,
            states, y if keeps_y else None, in_h, x_h, dt_h, out_h, conv_weight, conv_bias, A, D,
            dt_bias, *projections,
        )  # fmt: skip
        ctx.options, ctx.hidden_again = options, again
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        (hidden, xz, dbc, out, states, y, in_h, x_h, dt_h, out_h, conv_weight, conv_bias, A, D,
         dt_bias, *projections) = ctx.saved_tensors  # fmt: skip
        in_proj, x_proj, dt_proj, out_proj = _split(projections)
        options: Options = ctx.options
        asked = _Asked.of(ctx.needs_input_grad)
        with autocast_off(dy.device.type):
            if xz is None:
                hidden = ctx.hidden_again() if hidden is None else hidden
                xz, in_h = project(hidden, in_proj, options.in_proj, channel_first=True)
            x, z = xz.chunk(2, dim=1)

            def hidden_again() -> Tensor | None:
                remade = hidden is None and asked.in_proj.input
                return ctx.hidden_again() if remade else hidden

            ahead = None
            if asked.x_proj.x and has_work_ahead(in_proj, options.in_proj):
                # Beside out_proj's product and the scan, which leave bandwidth over.
                ahead = Ahead(dy.device, lambda: (scaled_weight(in_proj), hidden_again()))
            gated = gated_channels(out, z).mT if asked.out_proj.input else None
            dgated, *d_out_proj = project_backward(
                dy, gated, Kept(y, out_h), out_proj, options.out_proj, asked.out_proj,
                channel_first=True,
            )  # fmt: skip
            del gated
            if dgated is None:
                return (*[None] * _FIRST_OF_OUT_PROJ, *d_out_proj, None)

            if ahead is not None:
                ahead.begin()
            u = convolve(x, conv_weight, conv_bias)
            dt, B, C = _parts(dbc, dt_proj, A)
            delta, _ = project(dt.mT, dt_proj, options.dt_proj, channel_first=True)
            # Its halves side by side: what in_proj's backward takes.
            dxz = torch.empty_like(xz)
            dx, dz = dxz.chunk(2, dim=1)
            du, ddelta, dA, dB, dC, dD, d_dt_bias = scan_backward(
                u, delta, A, B, C, D, z, dt_bias, dgated, states, out, dz, True, False
            )
            del dgated

            ddt, *d_dt_proj = project_backward(
                ddelta.mT, dt.mT, Kept(delta.mT, dt_h), dt_proj, options.dt_proj, asked.dt_proj,
                channel_first=True,
            )  # fmt: skip
            del ddelta, delta
            d_x_proj: list[Tensor | None] = [None] * (_OPERANDS - 1)
            if ddt is not None:
                ddbc = torch.empty_like(dbc)
                for part, gradient in zip(_parts(ddbc, dt_proj, A), (ddt, dB, dC), strict=True):
                    part.copy_(gradient)
                _, *d_x_proj = project_backward(
                    ddbc.mT, u.mT, Kept(dbc.mT, x_h), x_proj, options.x_proj, asked.x_proj,
                    channel_first=True, into=du,
                )  # fmt: skip
            d_conv_weight = d_conv_bias = d_hidden = None
            d_in_proj: list[Tensor | None] = [None] * (_OPERANDS - 1)
            if asked.x_proj.x:
                d_conv_weight, d_conv_bias = convolve_backward(x, conv_weight, conv_bias, du, dx)
                del du, u
                scaled, hidden = (None, hidden_again()) if ahead is None else ahead.take()
                d_hidden, *d_in_proj = project_backward(
                    dxz.mT, hidden, Kept(xz.mT, in_h, scaled), in_proj, options.in_proj,
                    asked.in_proj,
                )  # fmt: skip
        gradients = (
            d_hidden, None, None, d_conv_weight, d_conv_bias, dA, dD, d_dt_bias,
            *d_in_proj, None, *d_x_proj, None, *d_dt_proj, None, *d_out_proj, None,
        )  # fmt: skip
        return tuple(
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=True)
        )


_OPERANDS = len(Operands._fields)
_FIRST_OF_OUT_PROJ = 8 + 3 * _OPERANDS
_SCALE_OF_OUT_PROJ = _FIRST_OF_OUT_PROJ + Operands._fields.index("scale_deviation")


class _Asked(NamedTuple):
    """Which gradients each projection has to give; ``x`` where something before it asks."""

    in_proj: Needs
    x_proj: Needs
    dt_proj: Needs
    out_proj: Needs

    @classmethod
    def of(cls, needs: tuple[bool, ...]) -> _Asked:
        """Read ``ctx.needs_input_grad``, whose order is that of ``MambaBlock.forward``."""
        first = range(8, len(needs), _OPERANDS)
        own_in, own_x, own_dt, own_out = (needs[i : i + _OPERANDS - 1] for i in first)
        through_in = needs[0] or any(own_in)
        through_u = through_in or any(needs[3:5])
        through_dbc = through_u or any(own_x)
        through_scan = through_dbc or any(own_dt) or any(needs[5:8])
        return cls(
            Needs(needs[0], *own_in), Needs(through_u, *own_x), Needs(through_dbc, *own_dt),
            Needs(through_scan, *own_out),
        )  # fmt: skip


def _split(projections: tuple[Any, ...] | list[Any]) -> list[Operands]:
    return [
        Operands(*projections[i : i + _OPERANDS]) for i in range(0, len(projections), _OPERANDS)
    ]


def _parts(dbc: Tensor, dt_proj: Operands, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_proj's output [b, R + 2N, l] -> views dt [b, R, l], B and C [b, 1, N, l]."""
    rank, state = dt_proj.weight.shape[1], A.shape[1]
    dt, B, C = dbc.split([rank, state, state], dim=1)
    return dt, B.unsqueeze(1), C.unsqueeze(1)
