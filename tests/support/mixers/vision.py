"""A small ``VisionMamba`` and images for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prodial_kernels import VisionMamba


def tiny_vision_mamba(**options: Any) -> VisionMamba:
    """A 3-layer model on 2 × 2 patches, its parameters moved away from special values."""
    torch.manual_seed(0)
    sizes = {"width": 8, "depth": 3, "num_classes": 5, "image_size": 8, "patch_size": 4}
    model = VisionMamba(**{**sizes, "d_state": 4, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(batch: int = 2, side: int = 8) -> Tensor:
    """Random images, the same in every call."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
