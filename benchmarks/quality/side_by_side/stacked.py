"""Weights of plain models with a dimension of runs in front, and what multiplies by them.

A weight's first dimension is of runs, or of 1 where all runs share it; a layer's weights have one
of layers behind that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EMBEDDINGS",
    "HEAD",
    "Weights",
    "answered",
    "embedded",
    "layers_of",
    "linear",
    "rms_norm",
    "split_name",
    "weights_of",
    "wide",
]

EMBEDDINGS = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
_LAYERS = "backbone.layers.", "layers."
Weights = Mapping[str, Tensor]


def split_name(name: str) -> tuple[str, int | None]:
    """A parameter's name within its layer, and the layer; others have none."""
    for prefix in _LAYERS:
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
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


def layers_of(weights: Weights, names: Iterable[str]) -> dict[str, tuple[Tensor, ...]]:
    """Some weights layer by layer, [runs or 1, …] each.

    Taken apart at once: by ``[:, layer]``, each layer's gradient would be as large as all layers'.
    """
    return {name: weights[name].unbind(1) for name in names}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Of x [runs, b, l, i] and weight [runs or 1, o, i] -> [runs, b, l, o]."""
    if len(weight) == 1:
        return F.linear(x, weight[0].to(x.dtype))
    runs, batch, length, width = x.shape
    y = torch.bmm(x.reshape(runs, batch * length, width), weight.to(x.dtype).transpose(1, 2))
    return y.view(runs, batch, length, -1)


def wide(vector: Tensor) -> Tensor:
    """[runs or 1, n] -> [runs or 1, 1, 1, n]."""
    return vector[:, None, None]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in fp32 (or fp64); weight [runs or 1, n]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(x, x.shape[-1:], eps=epsilon) * wide(weight)


def embedded(w: Weights, ids: Tensor) -> Tensor:
    """Of tokens [runs, b, l], [runs, b, l, d]."""
    table = w[EMBEDDINGS]
    if len(table) == 1:
        return F.embedding(ids, table[0])
    runs, size, width = table.shape
    offset = size * torch.arange(runs, device=ids.device)[:, None, None]
    return F.embedding(ids + offset, table.reshape(runs * size, width))


def answered(
    w: Weights, x: Tensor, positions: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """Logits of a language model at ``positions`` [runs, b, k] of x [runs, b, l, d], in fp32.

    The head is the table of embeddings where the weights have none of its own; ``dtype`` is that
    of its products.
    """
    x = x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[-1]))
    x = rms_norm(x, w["backbone.norm_f.weight"], epsilon).to(dtype)
    return linear(x, w.get(HEAD, w[EMBEDDINGS])).float()
