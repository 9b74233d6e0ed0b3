"""The dequantising kernels against the PyTorch code that defines them, and what they compile to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels.quantization import FORMATS
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.quantization.int8 import Int8Linear
from prodial_kernels.quantization.modules.experts import QuantizedStack
from prodial_kernels.quantization.nf4 import NF4Linear
from support.kernels.uninterpreted import run_uninterpreted
from support.stored.grouped_weights import STORED, stored
from support.stored.same_bits import assert_same_bits, bits

LAYERS = {layer.FORMAT: layer for layer in (NF4Linear, Int8Linear, FP8Linear)}
SHAPES = [(72, 96), (1, 1), (7, 9), (130, 257), (33, 128), (3, 4100)]
# The interpreter truncates to bf16 where it should round.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def weights(shape: tuple[int, int]) -> Tensor:
    """Scales far apart, zeros, and values that are subnormal in 16 bits."""
    weight = torch.randn(shape) * torch.logspace(-30, 3, shape[0])[:, None]
    weight[:, ::5] = 0
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_bits(format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_same_bits(LAYERS[format].quantize(weights(shape), None), dtype)


def test_scales_that_are_not_quantised_themselves() -> None:
    layer = NF4Linear.quantize(weights((24, 50)), None, double_quantization=False)
    assert layer.nested_absmax is None
    assert_same_bits(layer, torch.float16)


@pytest.mark.parametrize(("blocksize", "nested"), [(32, 256), (128, 64), (4096, 256)])
def test_blocks_of_other_sizes(blocksize: int, nested: int) -> None:
    """As checkpoints may have them; 3 x 4100 weights end inside a block of any size."""
    blocks = -(-3 * 4100 // blocksize)
    layer = NF4Linear(
        4100, 3, None, torch.float32,
        codes=torch.randint(256, (6150, 1), dtype=torch.uint8),
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8),
        quant_map=torch.linspace(-1, 1, 16), blocksize=blocksize,
        nested=(torch.rand(-(-blocks // nested)), torch.linspace(-1, 1, 256), torch.tensor(0.3)),
        nested_blocksize=nested,
    )  # fmt: skip
    assert_same_bits(layer, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_some_of_several_weights(double: bool, dtype: torch.dtype) -> None:
    """In one launch, in the order asked for; 33 × 129 weights end within a block and a byte."""
    layers = [
        NF4Linear.quantize(weights((33, 129)), None, double_quantization=double) for _ in range(5)
    ]
    stack = QuantizedStack(5, layers[0])
    for index, layer in enumerate(layers):
        stack.put(index, layer)
    known = [4, 0, 3]
    defined = torch.stack([layers[index].dequantize(dtype=dtype) for index in known])
    found = torch.empty(3, 33, 129, dtype=dtype)
    if torch.cuda.is_available():
        found = stack.cuda().unpack_some(torch.tensor(known).cuda(), known, found.cuda()).cpu()
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prodial_kernels.quantization.nf4.takes_kernels", lambda *_: True)
            stack.unpack_some(torch.tensor(known), known, found)
    assert torch.equal(bits(found), bits(defined))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_of_eight_bits(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 256)
    scales = torch.tensor([1.0, 3e-4])
    assert_same_bits(Int8Linear(codes.view(torch.int8), scales * 127, None, dtype), dtype)
    assert_same_bits(FP8Linear(codes.view(torch.float8_e4m3fn), scales[None], None, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(130, 257), (1, 300), (33, 128)], ids=str)
def test_a_scale_for_every_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """As torchao stores int8 and e4m3."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales = torch.logspace(-6, 1, shape[0])
    assert_same_bits(Int8Linear(codes, scales, None, dtype, step=1.0), dtype)
    e4m3 = codes.float().to(torch.float8_e4m3fn)
    assert_same_bits(FP8Linear(e4m3, scales[:, None], None, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "arguments", [each for each in STORED if each.get("dtype") != torch.bfloat16], ids=str
)
def test_codes_in_groups(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    assert_same_bits(stored(**arguments), dtype)


def test_what_they_compile_to(tmp_path: Path) -> None:
    """For every kind of GPU, aligned and not; the script names what breaks a rule."""
    run_uninterpreted(tmp_path, "compile_dequantize.py")
