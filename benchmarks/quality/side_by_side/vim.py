"""``VisionMamba`` with a dimension of runs: images [runs, batch, 3, h, w], weights of each run.

The mixers' two scans are those of :mod:`.selective`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.side_by_side.selective import parts_of, scanned
from benchmarks.quality.side_by_side.stacked import Weights, layers_of, linear, rms_norm, wide
from prodial_kernels import VisionMamba

__all__ = ["Shape", "forward", "shape_of"]

# The second reads backwards.
_DIRECTIONS = (parts_of(), parts_of("_b"))
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
            mixed = mixed + scanned(xz, [layers[name][layer] for name in direction], bool(i))
        mixed = (mixed / len(_DIRECTIONS)).permute(1, 0, 3, 2)
        x = x + linear(mixed, layers[_OUT][layer])
    x = rms_norm(x[:, :, middle : middle + 1], w["norm_f.weight"], shape.epsilon)
    return (linear(x, w["head.weight"]) + wide(w["head.bias"]))[:, :, 0]
