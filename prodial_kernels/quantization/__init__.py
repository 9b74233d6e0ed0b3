"""Frozen weights in 4 or 8 bits, in the layouts that existing checkpoints and libraries use.

| format | layout | tensors of the state dict |
|---|---|---|
| ``nf4`` | bitsandbytes ``Linear4bit`` | ``weight``, ``weight.absmax``, ``weight.quant_map``, \
``weight.nested_absmax``, ``weight.nested_quant_map``, ``weight.quant_state.bitsandbytes__nf4`` |
| ``int8`` | bitsandbytes ``Linear8bitLt`` (LLM.int8's CB and SCB) | ``weight``, ``SCB``, \
``weight_format`` |
| ``fp8`` | e4m3 with 128×128 block scales, as DeepSeek-V3's checkpoints | ``weight``, \
``weight_scale_inv`` |

A call dequantises the weight into a temporary that lives for one product, and backward does so
again: no dense copy is kept. On a GPU a Triton kernel does it, bit for bit as the PyTorch code.
The temporary comes from ``torch.empty`` on purpose: PyTorch's caching allocator hands the same
memory to layer after layer, as a scratch buffer of our own would, but also knows about streams,
threads, reentrant backward passes and CUDA graphs.
"""

from prodial_kernels.quantization.convert import (
    FORMATS,
    QuantizationError,
    from_state_dict,
    quantization_error,
    quantize_linear,
)
from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.loading import load_quantized
from prodial_kernels.quantization.model import QuantizationReport, quantize_model
from prodial_kernels.quantization.tensor_files import TensorFiles

__all__ = [
    "FORMATS",
    "QuantizationError",
    "QuantizationReport",
    "QuantizedLinear",
    "TensorFiles",
    "from_state_dict",
    "load_quantized",
    "quantization_error",
    "quantize_linear",
    "quantize_model",
]
