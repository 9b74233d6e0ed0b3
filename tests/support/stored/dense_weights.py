"""Weights to quantise, and what of them is stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prodial_kernels.quantization import QuantizedLinear

# What bitsandbytes writes of waves(6, 22) in NF4 beside its codes and scales.
NF4_STATE = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 22]}'


def waves(rows: int, columns: int) -> Tensor:
    """A weight that every machine computes alike, for bytes and values that tests write down."""
    i = torch.arange(rows * columns, dtype=torch.float64)
    return (torch.sin(i * 1.37 + 0.2) * torch.exp(torch.cos(i * 0.011))).float().view(rows, columns)


def dense(
    weight: Tensor | tuple[int, int], *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    if not isinstance(weight, Tensor):
        weight = torch.randn(weight) * 0.1
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight = nn.Parameter(weight)
    return linear.to(dtype)


def stored(layer: QuantizedLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert bytes(tensor.flatten().view(torch.uint8)) == bytes(
            b[name].flatten().view(torch.uint8)
        )
