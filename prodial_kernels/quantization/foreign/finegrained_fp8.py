"""``FP8Linear`` of transformers, as FP8 checkpoints with 128×128 tiles are loaded on a GPU.

The layer also rounds its inputs to FP8, which an adapted one does not: it computes with the same
stored weight, and with inputs in 16 bits. transformers itself, where it has no kernels, dequantises
such a checkpoint with other tiles than it was made with (``rows // number of scales``), which is
wrong where the last tile is smaller; nothing is dequantised here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prodial_kernels.quantization.fp8 import TILE, FP8Linear


def is_finegrained_fp8(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of transformers' fine-grained FP8."""
    return any(
        cls.__name__ == "FP8Linear" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def from_finegrained_fp8(module: nn.Module, dtype: torch.dtype | None = None) -> FP8Linear:
    """Return the layer with the same stored weight; ``dtype`` defaults to that of its bias.

    Raises:
        ValueError: Another format than e4m3 with a scale per 128×128 tile or one in all, inputs
            with a fixed scale, or a class of its own.
    """
    if type(module).__name__ != "FP8Linear":
        raise ValueError(
            f"a {type(module).__name__} is called in another way than a linear layer; take it out "
            "of target_modules"
        )
    weight, scales = module._parameters["weight"], module._parameters["weight_scale_inv"]
    if weight is None or scales is None or weight.is_meta:
        raise ValueError("an FP8Linear without a weight; load its weight first")
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"an FP8Linear whose weight is {weight.dtype}: read are e4m3 codes. FP4 has no layout "
            "here; a dequantised model is saved and loaded again as a dense one"
        )
    if module._parameters.get("activation_scale") is not None:
        raise ValueError(
            "an FP8Linear with a fixed scale for its inputs (activation_scheme='static'), which an "
            "adapted layer would not apply; use a checkpoint with activation_scheme='dynamic', or "
            "the dense one"
        )
    scale_inv = scales.detach()
    if scale_inv.numel() == 1:
        tiles = [-(-size // TILE) for size in weight.shape]
        scale_inv = scale_inv.reshape(1, 1).expand(tiles)
    bias = module._parameters.get("bias")
    entries: dict[str, Tensor] = {"weight": weight.detach(), "weight_scale_inv": scale_inv}
    if dtype is None and bias is not None:
        dtype = bias.dtype
    return FP8Linear.from_entries(entries, bias, dtype)
