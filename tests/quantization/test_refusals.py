"""What cannot be quantised, and entries that are no quantised weight, are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from stored_weights import NF4_STATE, assert_same_bytes, dense, stored, waves
from torch import Tensor, nn

from prodial_kernels.quantization import FORMATS, from_state_dict, quantize_linear
from prodial_kernels.quantization.nf4 import NF4Linear


@pytest.mark.parametrize("format", FORMATS)
def test_load_state_dict_refuses_what_does_not_fit(format: str) -> None:
    layer = quantize_linear(dense((33, 65)), format)
    state = layer.state_dict()
    before = stored(layer)
    with pytest.raises(RuntimeError, match=r"got \[5, 65\]"):
        layer.load_state_dict(quantize_linear(dense((5, 65)), format).state_dict())
    for name in state:
        if name != "weight_format":
            with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
                layer.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight.extra"'):
        layer.load_state_dict({**state, "weight.extra": torch.ones(1)})
    assert_same_bytes(stored(layer), before)


def test_quantize_linear_refuses() -> None:
    linear = dense((4, 6))
    with pytest.raises(ValueError, match="format must be one of 'nf4', 'int8', 'fp8', got 'int3'"):
        quantize_linear(linear, "int3")
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got Conv1d"):
        quantize_linear(nn.Conv1d(1, 1, 1), "nf4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16.*torch.float64"):
        quantize_linear(dense((4, 6), dtype=torch.float64), "nf4")
    with pytest.raises(ValueError, match=r"no values to quantise .* on meta"):
        quantize_linear(nn.Linear(3, 3, device="meta"), "nf4")
    for wrong in (math.nan, math.inf):
        with torch.no_grad():
            linear.weight[1, 2] = wrong
        with pytest.raises(ValueError, match="not finite"):
            quantize_linear(linear, "fp8")


def nf4_state(**changes: object) -> Tensor:
    state = {**json.loads(NF4_STATE), **changes}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type 'nf4'"),
        ({"blocksize": 63}, "blocksize"),
        ({"dtype": "int8"}, "dtype"),
        ({"shape": [132]}, "a matrix"),
        ({"shape": [6, 23]}, "weight must have 69 elements"),
        ({"blocksize": 32}, "weight.absmax must have 5 elements"),
    ],
)
def test_a_wrong_quant_state_is_refused(changes: dict[str, object], message: str) -> None:
    layer = NF4Linear.quantize(waves(6, 22), None, double_quantization=False)
    entries = {**layer.state_dict(), "weight.quant_state.bitsandbytes__nf4": nf4_state(**changes)}
    with pytest.raises(ValueError, match=message):
        from_state_dict(entries)


def test_wrong_entries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no quantised weight under prefix 'a.'.*found nothing"):
        from_state_dict({"b.SCB": torch.ones(1)}, "a.")
    with pytest.raises(ValueError, match="found bias, weight"):
        from_state_dict(dense((4, 6)).state_dict())
    int8 = quantize_linear(dense((4, 6)), "int8").state_dict()
    with pytest.raises(ValueError, match=r"weight_format must be 0 .rows., got 2"):
        from_state_dict({**int8, "weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"SCB \[3\]"):
        from_state_dict({**int8, "SCB": torch.ones(3)})
    fp8 = quantize_linear(dense((130, 6)), "fp8").state_dict()
    with pytest.raises(ValueError, match=r"weight_scale_inv \[2, 1\].*got .* \[1, 1\]"):
        from_state_dict({**fp8, "weight_scale_inv": torch.ones(1, 1)})
    nf4 = quantize_linear(dense((130, 6)), "nf4").state_dict()
    damaged = torch.tensor(list(b'{"quant'), dtype=torch.uint8)
    with pytest.raises(ValueError, match="is damaged"):
        from_state_dict({**nf4, "weight.quant_state.bitsandbytes__nf4": damaged})
    with pytest.raises(ValueError, match="absmax must be uint8"):
        from_state_dict({**nf4, "weight.absmax": nf4["weight.absmax"].float()})
