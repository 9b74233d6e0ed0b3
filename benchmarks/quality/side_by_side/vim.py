"""``VisionMamba`` with a dimension of runs: images [runs, batch, 3, h, w], weights of each run.

Between a mixer's projectors, runs are groups of channels: on a GPU that is what mamba-ssm's
selective scan and causal-conv1d take, elsewhere the package's own scan runs once for each run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.side_by_side.stacked import Weights, layers_of, linear, rms_norm, wide
from prodial_kernels import VisionMamba
from prodial_kernels.models.mixers.vim_scan import selective_scan

__all__ = ["Shape", "forward", "shape_of"]

_PARTS = ("conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight",
          "dt_proj{}.bias", "A{}_log", "D{}")  # fmt: skip
# By direction; the second reads backwards.
_DIRECTIONS = tuple(tuple(f"mixer.{part.format(end)}" for part in _PARTS) for end in ("", "_b"))
_NORM, _INTO, _OUT = "norm.weight", "mixer.in_proj.weight", "mixer.out_proj.weight"


@dataclass(frozen=True)
class Shape:
    """What :func:`forward` must know beside the weights."""

    layers: int
    patch: int
    epsilon: float


def shape_of(model: VisionMamba) -> Shape:
    """Read a model's shape.

    Raises:
        ValueError: Its patches overlap, or a layer is left out at times.
    """
    embedding = model.patch_embed.proj
    if embedding.stride != embedding.kernel_size or model.drop_path.probability:
        raise ValueError(
            "base: expected patches side by side and no drop_path, got a stride of "
            f"{embedding.stride[0]} for patches of {embedding.kernel_size[0]} and "
            f"{model.drop_path.probability}; run its rows one by one (`run` without --side-by-side)"
        )
    return Shape(len(model.layers), embedding.kernel_size[0], model.norm_f.eps)


def _patches(shape: Shape, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Images [runs, b, c, h, w] and a convolution's weight [runs or 1, d, c, p, p] -> tokens."""
    side = shape.patch
    cut = images.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))  # [r, b, c, h, p, w, p]
    tokens = cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
    return linear(tokens, weight.flatten(2)) + wide(bias)


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


def _direction(xz: Tensor, parts: list[Tensor]) -> Tensor:
    """One direction of a mixer: xz [b, runs, 2e, l] -> [b, runs, e, l]; parts [runs, …]."""
    weight, bias, x_proj, dt_proj, dt_bias, A_log, D = parts
    x, z = xz.chunk(2, dim=2)
    u = _convolve(x.flatten(1, 2), weight.flatten(0, 1).squeeze(1), bias.flatten()).view_as(x)
    rank, states = dt_proj.shape[-1], A_log.shape[-1]
    dt, B, C = (x_proj @ u).split([rank, states, states], dim=2)
    A = -torch.exp(A_log)
    return _scan(u, dt_proj @ dt, A, B.contiguous(), C.contiguous(), D, z.contiguous(), dt_bias)


def forward(shape: Shape, w: Weights, images: Tensor) -> Tensor:
    """Logits [runs, b, classes] of images [runs, b, 3, h, w], in fp32.

    Args:
        shape: Of the model.
        w: As ``weights_of`` gives them, any with a leading dimension of runs.
        images: In [-1, 1].
    """
    runs, batch = images.shape[:2]
    x = _patches(shape, images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"])
    middle = x.shape[2] // 2
    token = w["cls_token"].expand(runs, batch, 1, -1)
    x = torch.cat([x[:, :, :middle], token, x[:, :, middle:]], 2) + w["pos_embed"]
    names = (_NORM, _INTO, _OUT, *_DIRECTIONS[0], *_DIRECTIONS[1])
    layers = layers_of(w, names)
    for layer in range(shape.layers):
        normed = rms_norm(x, layers[_NORM][layer], shape.epsilon)
        xz = linear(normed, layers[_INTO][layer]).permute(1, 0, 3, 2).contiguous()
        mixed = torch.zeros((), device=x.device)
        for i, direction in enumerate(_DIRECTIONS):
            parts = [layers[name][layer] for name in direction]
            own = [part.expand(runs, *part.shape[1:]) for part in parts]
            y = _direction(xz.flip(-1) if i else xz, own)
            mixed = mixed + (y.flip(-1) if i else y)
        mixed = (mixed / len(_DIRECTIONS)).permute(1, 0, 3, 2)
        x = x + linear(mixed, layers[_OUT][layer])
    x = rms_norm(x[:, :, middle : middle + 1], w["norm_f.weight"], shape.epsilon)
    return (linear(x, w["head.weight"]) + wide(w["head.bias"]))[:, :, 0]
