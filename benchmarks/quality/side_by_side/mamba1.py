"""Mamba-1 with a dimension of runs: tokens [runs, batch, length], each run with its own weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.side_by_side.selective import parts_of, scanned
from benchmarks.quality.side_by_side.stacked import (
    Weights,
    answered,
    embedded,
    layers_of,
    linear,
    rms_norm,
)

__all__ = ["Shape", "forward", "shape_of"]

_NORM, _INTO, _OUT = "norm.weight", "mixer.in_proj.weight", "mixer.out_proj.weight"


@dataclass(frozen=True)
class Shape:
    """What :func:`forward` must know beside the weights."""

    layers: int
    epsilon: float


def shape_of(model: Any) -> Shape:
    """Read a model's shape.

    Raises:
        ValueError: It is not a Mamba-1 without biases in its projectors.
    """
    config = model.config
    if config.model_type != "mamba" or config.use_bias or not config.use_conv_bias:
        raise ValueError(
            "base: expected a Mamba-1 with a bias in its convolution and none in its projectors, "
            f"got {config.model_type}; run its rows one by one (`run` without --side-by-side)"
        )
    return Shape(config.num_hidden_layers, config.layer_norm_epsilon)


def forward(shape: Shape, w: Weights, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits at some positions of sequences, in fp32; arguments as ``mamba2.forward`` has them."""
    x = embedded(w, ids)
    parts = parts_of()
    layers = layers_of(w, (_NORM, _INTO, _OUT, *parts))
    for layer in range(shape.layers):
        normed = rms_norm(x, layers[_NORM][layer], shape.epsilon)
        xz = linear(normed, layers[_INTO][layer]).permute(1, 0, 3, 2).contiguous()
        mixed = scanned(xz, [layers[name][layer] for name in parts]).permute(1, 0, 3, 2)
        x = x + linear(mixed, layers[_OUT][layer])
    return answered(w, x, positions, shape.epsilon, torch.float32)
