"""Layers stored in fp8, and operands of projections that are computed in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.testing import LinearCase, make_case

PARTS: dict[str, dict[str, None]] = {
    "no blocks": {"blocks": None},
    "no scale": {"scale": None},
    "no lora": {"lora_a": None, "lora_b": None},
    "no bias": {"bias": None},
    "only scale": {"blocks": None, "lora_a": None, "lora_b": None, "bias": None},
    "only lora": {"blocks": None, "scale": None, "bias": None},
}
"""What a projection may be without, as changes of a case."""


def stored(n: int, k: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> FP8Linear:
    """A layer whose scales are powers of two, so that 16 bits hold its weight exactly."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(n, k, generator=generator) * k**-0.5
    layer = FP8Linear.quantize(weight.to(dtype), None)
    layer.weight_scale_inv.copy_(layer.weight_scale_inv.log2().round().exp2())
    return layer.to(device)


def fp8_case(layer: FP8Linear, tokens: int | tuple[int, ...], **options: Any) -> LinearCase:
    """Operands of a projection in fp8 whose weight is what ``layer`` stands for."""
    device = layer.codes.device.type
    case = make_case(tokens, layer.in_features, layer.out_features, device=device, **options)
    return replace(case, weight=layer.dequantize().double(), compute="fp8")
