"""Quantised layers with adapters, their operands, and dense weights that are kept."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear
from prodial_kernels.functional import checked_linear
from prodial_kernels.kernels.projector.operands import Impl
from prodial_kernels.quantization import QuantizedLinear, quantize_linear
from prodial_kernels.testing import LinearCase, make_case
from support.models import randomise_adapters

K, N = 96, 72


def quantised(
    format: str = "nf4", *, shape: tuple[int, int] = (N, K), bias: bool = True, **kind: Any
) -> QuantizedLinear:
    torch.manual_seed(3)
    return quantize_linear(nn.Linear(shape[1], shape[0], bias=bias, **kind), format)


def adapted(base: nn.Linear | QuantizedLinear, **options: Any) -> ProdialLinear:
    layer = ProdialLinear.from_linear(base, **{"block_size": 6, "r": 4, **options})
    randomise_adapters(layer)
    return layer


def case_on(layer: QuantizedLinear, tokens: int | tuple[int, ...], **options: Any) -> LinearCase:
    """Operands whose weight is what ``layer`` stands for."""
    case = make_case(tokens, layer.in_features, layer.out_features, **options)
    return replace(case, weight=layer.dequantize().double())


def runner(layer: QuantizedLinear, impl: Impl = "auto", **changes: Any) -> Any:
    def run(case: LinearCase) -> Tensor:
        operands = case.operands._replace(weight=layer.stand_in(), noise=None)
        options = replace(case, **changes).options(impl)._replace(packed=layer.packed_weight())
        return checked_linear(case.x, operands, options, training=True)

    return run


def kept_by(function: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


def dense_weights(shape: tuple[int, int] = (N, K)) -> int:
    """Floating-point tensors of a weight's shape that are alive."""
    gc.collect()
    return sum(map(partial(is_dense, shape), gc.get_objects()))


def is_dense(shape: tuple[int, ...], o: object) -> bool:
    return (
        type(o) is Tensor
        and o.shape == shape
        and o.is_floating_point()
        and o.itemsize > 1
        and not o.is_meta
        and o.untyped_storage().nbytes() >= o.nbytes
    )
