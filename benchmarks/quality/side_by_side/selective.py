"""Mamba-1's selective scan with a dimension of runs, and what stands beside it in a mixer.

Runs are groups of channels: on a GPU that is what mamba-ssm's scan and causal-conv1d take,
elsewhere the package's own scan runs once for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.models.mixers.vim_scan import selective_scan

__all__ = ["parts_of", "scanned"]

_PARTS = ("conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight",
          "dt_proj{}.bias", "A{}_log", "D{}")  # fmt: skip


def parts_of(end: str = "") -> tuple[str, ...]:
    """Names of a scan's weights within a layer; Vision Mamba's second direction ends in ``_b``."""
    return tuple(f"mixer.{part.format(end)}" for part in _PARTS)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``silu`` of the causal convolution: x [b, c, l], weight [c, k], bias [c]."""
    if x.is_cuda:
        from causal_conv1d import causal_conv1d_fn

        made: Tensor = causal_conv1d_fn(x, weight, bias, activation="silu")
        return made
    channels, width = weight.shape
    padded = F.pad(x, (width - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels))


def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The gated scan of all runs.

    Args:
        u: [b, runs, e, l].
        dt: Likewise, before ``bias`` and softplus.
        A: [runs, e, n], negative.
        B: [b, runs, n, l].
        C: Likewise.
        D: [runs, e].
        z: As ``u``.
        bias: [runs, e].

    Returns:
        As ``u``.
    """
    if u.is_cuda:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        made: Tensor = selective_scan_fn(
            u.flatten(1, 2), dt.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten(), z.flatten(1, 2),
            bias.flatten(), delta_softplus=True,
        )  # fmt: skip
        return made.view_as(u)
    step = F.softplus(dt + bias[..., None])
    over_runs: Callable[..., Tensor] = torch.vmap(
        selective_scan, in_dims=(1, 1, 0, 1, 1), out_dims=1
    )
    return (over_runs(u, step, A, B, C) + D[..., None] * u) * F.silu(z)


def scanned(xz: Tensor, parts: Sequence[Tensor], reverse: bool = False) -> Tensor:
    """What lies between a mixer's projectors, of all runs, in the order of its input.

    Args:
        xz: [b, runs, 2e, l], values above gate.
        parts: The weights of :func:`parts_of`, [runs or 1, …].
        reverse: Whether to scan from the last token to the first.

    Returns:
        [b, runs, e, l].
    """
    runs = xz.shape[1]
    xz = xz.flip(-1) if reverse else xz
    weight, bias, x_proj, dt_proj, dt_bias, A_log, D = (
        part.expand(runs, *part.shape[1:]) for part in parts
    )
    x, z = xz.chunk(2, dim=2)
    u = _convolve(x.flatten(1, 2), weight.flatten(0, 1).squeeze(1), bias.flatten()).view_as(x)
    rank, states = dt_proj.shape[-1], A_log.shape[-1]
    dt, B, C = (x_proj @ u).split([rank, states, states], dim=2)
    A = -torch.exp(A_log)
    y = _scan(u, dt_proj @ dt, A, B.contiguous(), C.contiguous(), D, z.contiguous(), dt_bias)
    return y.flip(-1) if reverse else y
