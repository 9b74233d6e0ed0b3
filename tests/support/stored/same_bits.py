"""A layer's weight by its kernel and by the code that defines it, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prodial_kernels.quantization import QuantizedLinear


def assert_same_bits(layer: QuantizedLinear, dtype: torch.dtype) -> None:
    """Compare what the CPU's code and the kernel make of one layer."""
    defined = layer.cpu().dequantize(dtype=dtype)
    if torch.cuda.is_available():
        found = layer.cuda().dequantize(dtype=dtype).cpu()
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prodial_kernels.quantization.layer.takes_kernels", lambda *_: True)
            found = layer.dequantize(dtype=dtype)
    assert torch.equal(bits(found), bits(defined))


def bits(tensor: Tensor) -> Tensor:
    """The bits; a NaN of one sign is as good as one of the other."""
    return tensor.nan_to_num(nan=1.5).view(torch.int16 if tensor.itemsize == 2 else torch.int32)
