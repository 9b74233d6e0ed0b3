"""Quantised linear layers of other libraries, read as this package's own.

The stored tensors are taken over bit for bit, shared where the layouts are the same, else repacked
into the same bits; what cannot be read exactly is refused with the way out. None of the libraries
is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prodial_kernels.quantization.foreign.bitsandbytes import from_bitsandbytes, is_bitsandbytes
from prodial_kernels.quantization.foreign.compressed_tensors import (
    from_compressed,
    is_compressed_tensors,
)
from prodial_kernels.quantization.foreign.finegrained_fp8 import (
    from_finegrained_fp8,
    is_finegrained_fp8,
)
from prodial_kernels.quantization.foreign.gptq import from_gptq_or_awq, is_gptq_or_awq
from prodial_kernels.quantization.foreign.hqq import from_hqq_linear, is_hqq
from prodial_kernels.quantization.foreign.torchao import from_torchao, is_torchao, torchao_kind
from prodial_kernels.quantization.layer import QuantizedLinear

_READERS = (
    (is_bitsandbytes, from_bitsandbytes),
    (is_finegrained_fp8, from_finegrained_fp8),
    (is_torchao, from_torchao),
    (is_compressed_tensors, from_compressed),
    (is_gptq_or_awq, from_gptq_or_awq),
    (is_hqq, from_hqq_linear),
)


def is_foreign(module: nn.Module) -> bool:
    """Whether ``module`` is a quantised linear layer of a library that is known here."""
    return any(recognises(module) for recognises, _ in _READERS)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x Wᵀ + bias``: a plain layer, or one that stores W."""
    return isinstance(module, nn.Linear | QuantizedLinear) or is_foreign(module)


def dense_values(tensor: Tensor) -> Tensor:
    """Return what a tensor of torchao's stands for; any other tensor as it is."""
    return tensor.dequantize() if torchao_kind(tensor) is not None else tensor


def from_foreign(module: nn.Module, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """Return the layer with the same stored weight; ``module`` stays as it is.

    Args:
        module: A layer that :func:`is_foreign` recognises, with its weight.
        dtype: What hidden states are in, for a library that takes inputs in any dtype and does not
            say which the model computes in.

    Raises:
        ValueError: Another format, or a weight that is not there or no longer what was loaded.
    """
    read = next(reader for recognises, reader in _READERS if recognises(module))
    try:
        return read(module, dtype).train(module.training)
    except KeyError as error:
        raise ValueError(f"it lacks its entry {error.args[0]}; load the model again") from error
