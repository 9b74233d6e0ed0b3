"""Linear layers whose weight torchao quantised in 8 bits: int8 by rows, e4m3 by rows or tiles.

torchao keeps the class ``nn.Linear`` and puts a tensor subclass in the weight's place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.quantization.fp8 import TILE, FP8Linear
from prodial_kernels.quantization.int8 import Int8Linear
from prodial_kernels.quantization.layer import QuantizedLinear

_WAY_OUT = (
    "quantise with torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig, or load the model in "
    "16 bits and call prodial_kernels.quantize_model"
)


def is_torchao(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer with a weight of torchao's."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and torchao_kind(weight) is not None


def from_torchao(module: nn.Module, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """Return the layer with the same stored weight, in the dtype that torchao dequantises to.

    Raises:
        ValueError: Another format than those of this module, or quantised inputs.
    """
    weight: Any = module._parameters["weight"]
    bias = module._parameters.get("bias")
    kind = torchao_kind(weight)
    if kind not in ("Int8Tensor", "Float8Tensor"):
        raise ValueError(
            f"torchao's {kind} is no format that is read (int8 and e4m3 are); {_WAY_OUT}"
        )
    for name in ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"):
        if getattr(weight, name, None) is not None:
            raise ValueError(
                f"torchao's {kind} with {name} quantises or scales its inputs too, which an "
                f"adapted layer would not do; {_WAY_OUT}"
            )
    codes, scales, shape = weight.qdata, weight.scale, [*weight.shape]
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool((zero != 0).any()):
        raise ValueError(f"torchao's {kind} with a zero point is not read; {_WAY_OUT}")
    block = [*weight.block_size]
    entries: dict[str, Tensor] = {"weight": codes}
    if kind == "Int8Tensor" and block == [1, shape[1]]:
        entries["weight_scale_rows"] = scales.reshape(-1)
        return Int8Linear.from_entries(entries, bias, weight.dtype)
    tiles = [-(-size // TILE) for size in shape]
    by_block = {(1, shape[1]): [shape[0], 1], (TILE, TILE): tiles, (*shape,): None}
    if kind == "Int8Tensor" or tuple(block) not in by_block:
        raise ValueError(
            f"torchao's {kind} with a scale for each {block} of {shape} is not read; {_WAY_OUT}"
        )
    form = by_block[tuple(block)]
    entries["weight_scale_inv"] = scales.reshape(1, 1).expand(tiles) if form is None else scales
    return FP8Linear.from_entries(entries, bias, weight.dtype)


def torchao_kind(weight: Tensor) -> str | None:
    """Return the name of a tensor subclass of torchao's, or None."""
    cls = type(weight)
    return cls.__name__ if cls.__module__.startswith("torchao.") else None
