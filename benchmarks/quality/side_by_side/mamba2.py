"""Mamba-2 with a dimension of runs: tokens [runs, batch, length], each run with weights of its own.

Transformers' model in plain PyTorch, for sequences short enough to be one chunk of the scan. A
weight has a leading dimension of runs, or of 1 where all runs share it; a layer's weights have one
of layers behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EMBEDDINGS", "HEAD", "Shape", "between", "forward", "shape_of", "weights_of"]

EMBEDDINGS = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
_LAYERS = "backbone.layers."
Weights = Mapping[str, Tensor]


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


def split_name(name: str) -> tuple[str, int | None]:
    """A parameter's name within its layer, and the layer; others have none."""
    if name.startswith(_LAYERS):
        layer, _, rest = name.removeprefix(_LAYERS).partition(".")
        return rest, int(layer)
    return name, None


def weights_of(model: Any) -> dict[str, Tensor]:
    """The plain model's weights by name within a layer: [1, layers, …], or [1, …] of the rest."""
    found: dict[str, list[Tensor]] = {}
    alone: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        short, layer = split_name(name)
        if layer is None:
            alone[short] = parameter.detach()[None]
        else:
            found.setdefault(short, []).append(parameter.detach())
    return alone | {name: torch.stack(tensors)[None] for name, tensors in found.items()}


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Of x [runs, b, l, i] and weight [runs or 1, o, i] -> [runs, b, l, o]."""
    if len(weight) == 1:
        return F.linear(x, weight[0].to(x.dtype))
    runs, batch, length, width = x.shape
    y = torch.bmm(x.reshape(runs, batch * length, width), weight.to(x.dtype).transpose(1, 2))
    return y.view(runs, batch, length, -1)


def _wide(vector: Tensor) -> Tensor:
    """[runs or 1, n] -> [runs or 1, 1, 1, n]."""
    return vector[:, None, None]


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in fp32 (or fp64); weight [runs or 1, n]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(x, x.shape[-1:], eps=epsilon) * _wide(weight)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal, by channel: x [runs, b, l, c], weight [runs or 1, c, 1, k], bias [runs or 1, c]."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    length = x.shape[2]
    y = _wide(bias).to(x.dtype)
    for k in range(width):
        y = torch.addcmul(y, padded[:, :, k : k + length], _wide(weight[:, :, 0, k]).to(x.dtype))
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
    elapsed = torch.cumsum(dt * -torch.exp(_wide(A_log)), 2).transpose(2, 3)  # [runs, b, h, l]
    decay = (elapsed[..., :, None] - elapsed[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = torch.matmul(C, B.transpose(2, 3))[:, :, None] * decay.to(x.dtype)
    values = (x * dt.to(x.dtype)[..., None]).transpose(2, 3)
    y = torch.matmul(scores, values).transpose(2, 3)
    return torch.addcmul(y, x, _wide(D)[..., None].to(x.dtype))


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
    step = F.softplus(dt + _wide(dt_bias))
    length = x.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    y = _scan(values.unflatten(-1, (heads, -1)), step, A_log, B, C, D, later).flatten(3)
    return _norm(y * F.silu(gate), norm, epsilon).to(x.dtype)


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
    table = w[EMBEDDINGS]
    if len(table) == 1:
        x = F.embedding(ids, table[0])
    else:
        runs, size, width = table.shape
        offset = size * torch.arange(runs, device=ids.device)[:, None, None]
        x = F.embedding(ids + offset, table.reshape(runs * size, width))
    # Taken apart at once: by [:, layer], each layer's gradient would be as large as all layers'.
    layers = {name: w[name].unbind(1) for name in (_NORM, *_PROJECTORS, *_SMALL)}
    into, out = (layers[name] for name in _PROJECTORS)
    for layer in range(shape.layers):
        normed = _norm(x, layers[_NORM][layer], shape.epsilon).to(dtype)
        small = [layers[name][layer] for name in _SMALL]
        mixed = middle(_linear(normed, into[layer]), *small, shape.states, shape.epsilon)
        x = x + _linear(mixed, out[layer])
    x = x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[-1]))
    x = _norm(x, w["backbone.norm_f.weight"], shape.epsilon).to(dtype)
    return _linear(x, w.get(HEAD, table)).float()
