"""State dicts, copies, files and casts of a quantised layer keep every stored byte."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from prodial_kernels.quantization import FORMATS, from_state_dict, quantize_linear
from support.stored.dense_weights import assert_same_bytes, dense, stored


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_round_trip(format: str, bias: bool) -> None:
    model = nn.Sequential(quantize_linear(dense((33, 65), bias=bias), format))
    file = save_safetensors({k: v.contiguous() for k, v in model.state_dict().items()})
    state = load_safetensors(file)
    other = nn.Sequential(quantize_linear(dense((33, 65), bias=bias), format))
    assert not torch.equal(other[0].dequantize(), model[0].dequantize())
    other.load_state_dict(state)
    assert_same_bytes(stored(other[0]), stored(model[0]))
    assert torch.equal(other[0].dequantize(), model[0].dequantize())
    again = from_state_dict(state, "0.", dtype=torch.float32)
    assert type(again) is type(model[0])
    assert_same_bytes(stored(again), stored(model[0]))


@pytest.mark.parametrize("format", FORMATS)
def test_casts_change_the_compute_dtype_alone(format: str) -> None:
    layer = quantize_linear(dense((33, 65)), format)
    before, weight = stored(layer), layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), weight.bfloat16())
    assert layer(torch.randn(2, 65, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    after = stored(layer)
    del after["bias"], before["bias"]
    assert_same_bytes(after, before)
    assert layer.double().dequantize().dtype == torch.float64
    moved = layer.to("meta")
    assert moved.device.type == "meta"
    assert moved.dtype == torch.float64


@pytest.mark.parametrize("format", FORMATS)
def test_copy_save_and_repr(format: str) -> None:
    layer = quantize_linear(dense((33, 65)), format)
    # Python's own pickle knows no fp8 tensors; torch.save pickles the module around them.
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert_same_bytes(stored(twin), stored(layer))
        assert torch.equal(twin.dequantize(), layer.dequantize())
    assert f"format='{format}'" in repr(layer)
    assert "in_features=65, out_features=33, bias=True" in repr(layer)
