"""A ``ProdialLinear`` whose adapter is not at rest, and whether two adapters are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear


def plain(in_features: int = 42, out_features: int = 29, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def trained(linear: nn.Linear | None = None, *, seed: int = 1, **options: Any) -> ProdialLinear:
    """An adapted layer whose every part has moved."""
    options = {"block_size": 6, "r": 4, "lora_alpha": 2.0, **options}
    layer = ProdialLinear.from_linear(plain() if linear is None else linear, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in layer.adapter_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return layer


def adapter(layer: ProdialLinear) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.adapter_parameters()}


def assert_same_adapter(a: ProdialLinear, b: dict[str, Tensor]) -> None:
    assert adapter(a).keys() == b.keys()
    for name, tensor in adapter(a).items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name
