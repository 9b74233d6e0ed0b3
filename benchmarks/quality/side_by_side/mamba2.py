"""Mamba-2 with a dimension of runs: tokens [runs, batch, length], each run with weights of its own.

Transformers' model in plain PyTorch, for sequences short enough to be one chunk of the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.side_by_side.stacked import (
    Weights,
    answered,
    embedded,
    layers_of,
    linear,
    rms_norm,
    wide,
)

__all__ = ["Shape", "between", "forward", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """What :func:`forward` must know beside the weights."""

    layers: int
    states: int
    epsilon: float


def shape_of(model: Any) -> Shape:
    """Read a model's shape.

    Raises:
        ValueError: It is not a Mamba-2 of one group without biases in its projectors.
    """
    config = model.config
    if config.model_type != "mamba2" or config.n_groups != 1 or config.use_bias:
        raise ValueError(
            "base: expected a Mamba-2 with one group and no bias in its projectors, got "
            f"{config.model_type}; run its rows one by one (`run` without --side-by-side)"
        )
    if tuple(config.time_step_limit) != (0.0, float("inf")):
        raise ValueError(f"base: expected no limits of dt, got {config.time_step_limit}")
    return Shape(config.num_hidden_layers, config.state_size, config.layer_norm_epsilon)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal, by channel: x [runs, b, l, c], weight [runs or 1, c, 1, k], bias [runs or 1, c]."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    length = x.shape[2]
    y = wide(bias).to(x.dtype)
    for k in range(width):
        y = torch.addcmul(y, padded[:, :, k : k + length], wide(weight[:, :, 0, k]).to(x.dtype))
    return y


def _scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, later: Tensor
) -> Tensor:
    """The state-space sum as one masked product.

    Args:
        x: [runs, b, l, h, p].
        dt: [runs, b, l, h], fp32.
        A_log: [runs or 1, h].
        B: [runs, b, l, n].
        C: Likewise.
        D: [runs or 1, h].
        later: [l, l], True where a key is later than a query.

    Returns:
        [runs, b, l, h, p].
    """
    elapsed = torch.cumsum(dt * -torch.exp(wide(A_log)), 2).transpose(2, 3)  # [runs, b, h, l]
    decay = (elapsed[..., :, None] - elapsed[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = torch.matmul(C, B.transpose(2, 3))[:, :, None] * decay.to(x.dtype)
    values = (x * dt.to(x.dtype)[..., None]).transpose(2, 3)
    y = torch.matmul(scores, values).transpose(2, 3)
    return torch.addcmul(y, x, wide(D)[..., None].to(x.dtype))


def between(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm: Tensor,
    states: int,
    epsilon: float,
) -> Tensor:
    """From what in_proj gives to what out_proj takes: convolution, scan, gate and norm.

    Args:
        x: [runs, b, l, w]: gate, values, B, C and dt side by side.
        weight: [runs or 1, c, 1, 4], of the convolution; ``bias`` [runs or 1, c].
        dt_bias: [runs or 1, h]; ``A_log`` and ``D`` likewise.
        A_log: See above.
        bias: See above.
        D: See above.
        norm: [runs or 1, inner].
        states: Of B and of C.
        epsilon: Of the norm.

    Returns:
        [runs, b, l, inner], dtype of ``x``.
    """
    inner, heads = norm.shape[-1], A_log.shape[-1]
    gate, mixed, dt = x.split([inner, inner + 2 * states, heads], dim=-1)
    mixed = F.silu(_convolve(mixed, weight, bias))
    values, B, C = mixed.split([inner, states, states], dim=-1)
    step = F.softplus(dt + wide(dt_bias))
    length = x.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    y = _scan(values.unflatten(-1, (heads, -1)), step, A_log, B, C, D, later).flatten(3)
    return rms_norm(y * F.silu(gate), norm, epsilon).to(x.dtype)


_NORM = "norm.weight"
_PROJECTORS = "mixer.in_proj.weight", "mixer.out_proj.weight"
_SMALL = (
    "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias", "mixer.A_log", "mixer.D",
    "mixer.norm.weight",
)  # fmt: skip


def forward(
    shape: Shape,
    w: Weights,
    ids: Tensor,
    positions: Tensor,
    dtype: torch.dtype = torch.float32,
    middle: Callable[..., Tensor] = between,
) -> Tensor:
    """Logits at some positions of sequences.

    Args:
        shape: Of the model.
        w: As :func:`weights_of` gives them, any with a leading dimension of runs.
        ids: [runs, b, l].
        positions: [runs, b, k], below l.
        dtype: Of products of matrices and what is between them; norms and steps are in fp32.
        middle: :func:`between`, or one that computes the same.

    Returns:
        [runs, b, k, vocabulary], fp32.
    """
    x = embedded(w, ids)
    layers = layers_of(w, (_NORM, *_PROJECTORS, *_SMALL))
    into, out = (layers[name] for name in _PROJECTORS)
    for layer in range(shape.layers):
        normed = rms_norm(x, layers[_NORM][layer], shape.epsilon).to(dtype)
        small = [layers[name][layer] for name in _SMALL]
        mixed = middle(linear(normed, into[layer]), *small, shape.states, shape.epsilon)
        x = x + linear(mixed, out[layer])
    return answered(w, x, positions, shape.epsilon, dtype)
