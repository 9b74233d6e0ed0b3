"""What a ``ProdialLinear`` can be made of: every check of its options, before anything is made."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prodial_kernels._validation import (
    IMPLS,
    check_choice,
    check_dropout,
    check_finite,
    check_flag,
    check_integer,
    divisors,
)
from prodial_kernels.ops.diagonal import DIAGONALS
from prodial_kernels.quantization import QuantizedLinear

_ADAPTER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_base_layer(layer: object) -> None:
    """Raise TypeError unless ``layer`` is a linear layer, ValueError unless it has a size."""
    if not isinstance(layer, nn.Linear | QuantizedLinear):
        raise TypeError(
            f"base_layer must be an nn.Linear, got {type(layer).__name__}; a quantised "
            "layer comes from prodial_kernels.quantization"
        )
    if isinstance(layer, nn.Linear) and is_lazy(layer.weight):
        raise TypeError(
            f"base_layer must have its weight already, got a {type(layer).__name__} that has no "
            "shape yet; run the model once before it is adapted"
        )
    if layer.in_features < 1 or layer.out_features < 1:
        raise ValueError(
            "base_layer must have at least one feature in and out, got in_features="
            f"{layer.in_features}, out_features={layer.out_features}"
        )


def check_adapter(
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    diagonal: str,
    train_scale: bool,
    train_diagonal: bool,
    adapter_dtype: torch.dtype,
    impl: str,
) -> None:
    """Raise TypeError for an option of the wrong kind, ValueError for one out of range."""
    check_integer("r", r, least=0, hint=" (0 switches the LoRA part off)")
    check_finite("lora_alpha", lora_alpha)
    check_dropout(lora_dropout)
    check_choice("diagonal", diagonal, DIAGONALS)
    check_choice("impl", impl, IMPLS)
    check_flag("train_scale", train_scale)
    check_flag("train_diagonal", train_diagonal)
    if adapter_dtype not in _ADAPTER_DTYPES:
        names = ", ".join(str(dtype) for dtype in _ADAPTER_DTYPES)
        raise TypeError(f"adapter_dtype must be a dtype to train in ({names}), got {adapter_dtype}")
    if r == 0 and not train_scale and not train_diagonal:
        raise ValueError(
            "nothing would be trained: set r > 0, train_scale=True or train_diagonal=True"
        )


def resolve_block_size(in_features: int, n_blocks: int | None, block_size: int | None) -> int:
    """Return the side P of a diagonal block; 1 when neither argument is given.

    Raises:
        TypeError: The one given is no integer.
        ValueError: Both are given, or the one given does not divide ``in_features``.
    """
    if n_blocks is not None and block_size is not None:
        raise ValueError(
            f"give n_blocks or block_size, not both (got n_blocks={n_blocks}, "
            f"block_size={block_size})"
        )
    name, value = ("n_blocks", n_blocks) if n_blocks is not None else ("block_size", block_size)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1 or in_features % value:
        raise ValueError(
            f"{name}={value} must divide in_features={in_features}; "
            f"its divisors are {divisors(in_features)}"
        )
    return in_features // value if name == "n_blocks" else value
