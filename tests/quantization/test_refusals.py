"""What cannot be quantised, and entries that are no quantised weight, are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.quantization import FORMATS, from_state_dict, quantize_linear
from prodial_kernels.quantization.nf4 import NF4Linear
from support.stored.dense_weights import NF4_STATE, assert_same_bytes, dense, stored, waves


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


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [6.0, 22]}, {"shape": [True, 132]}, {"shape": [0, 22]}, {"shape": [-6, -22]},
        {"shape": "ab"}, {"shape": None}, {"shape": 6}, {"shape": [[6], 22]},
        {"shape": [10**400, 1]},
        {"blocksize": 64.0}, {"blocksize": "64"}, {"blocksize": 0}, {"blocksize": None},
        {"blocksize": [64]}, {"dtype": None}, {"dtype": ["float32"]}, {"quant_type": None},
        {"nested_blocksize": 0}, {"nested_blocksize": 256.0}, {"nested_offset": "1"},
        {"nested_offset": math.nan}, {"nested_offset": math.inf}, {"nested_offset": None},
        {"nested_dtype": "float16"}, {"extra": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("double", [False, True])
def test_malformed_quant_states_are_refused(changes: dict[str, object], double: bool) -> None:
    layer = NF4Linear.quantize(waves(6, 22), None, double_quantization=double)
    state = json.loads(bytes(layer.state_dict()[STATE].tolist()))
    text = json.dumps({**state, **changes})
    state = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"quant_state|weight must have"):
        from_state_dict({**layer.state_dict(), STATE: state})


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"1", b"null", b"\xff\xfe", b"[" * 100_000, b'{"shape": 1}']
)
def test_quant_states_that_are_none_are_refused(content: bytes) -> None:
    layer = NF4Linear.quantize(waves(6, 22), None)
    state = torch.tensor(list(content), dtype=torch.uint8)
    with pytest.raises(ValueError, match="is damaged"):
        from_state_dict({**layer.state_dict(), STATE: state})


@pytest.mark.parametrize("format", FORMATS)
def test_hostile_entries_end_in_the_documented_errors(format: str) -> None:
    """Every entry of a layer by itself replaced by what it is not: ValueError, or unharmed."""
    layer = quantize_linear(dense(waves(6, 22)), format)
    weight = layer.dequantize()
    for name, entry in layer.state_dict().items():
        if name in ("bias", STATE):
            continue
        numbers = entry.float()
        for wrong in (
            numbers.new_full(entry.shape, math.nan), numbers.new_full(entry.shape, -math.inf),
            torch.zeros(0), torch.ones(1, 1, 1, 2), torch.zeros(entry.shape, dtype=torch.int64),
            torch.zeros(entry.shape, dtype=torch.bool), entry.new_zeros(3, 3), numbers.cfloat(),
        ):  # fmt: skip
            if wrong.dtype == entry.dtype and wrong.shape == entry.shape and wrong.isfinite().all():
                continue
            try:
                read = from_state_dict({**layer.state_dict(), name: wrong}, dtype=torch.float32)
            except ValueError:
                continue
            # A tensor of one dtype may stand for another with the same bytes, or say nothing.
            assert torch.equal(read.dequantize(), weight) or name == "weight", (name, wrong)


def test_tables_and_scales_that_are_no_nf4_are_refused() -> None:
    entries = NF4Linear.quantize(waves(6, 22), None).state_dict()
    for name, message in (
        ("weight.quant_map", "must be NF4's table"),
        ("weight.nested_quant_map", "must ascend"),
    ):
        for wrong in (entries[name].flip(0), torch.zeros_like(entries[name])):
            with pytest.raises(ValueError, match=message):
                from_state_dict({**entries, name: wrong})
    half = {**entries, "weight.quant_map": entries["weight.quant_map"].bfloat16()}
    from_state_dict(half)


def test_scales_as_bare_exponents() -> None:
    """e8m0 says what it is; beside e4m3 codes, bytes are the same exponents."""
    layer = quantize_linear(dense(waves(6, 22)), "fp8")
    powers = torch.full((1, 1), 2.0**-6)
    entries = {**layer.state_dict(), "weight_scale_inv": powers.to(torch.float8_e8m0fnu)}
    expected = {**layer.state_dict(), "weight_scale_inv": powers}
    read, same = from_state_dict(entries), from_state_dict(expected)
    assert torch.equal(read.dequantize(), same.dequantize())
    entries["weight_scale_inv"] = entries["weight_scale_inv"].view(torch.uint8)
    assert torch.equal(from_state_dict(entries).dequantize(), same.dequantize())
    entries["weight_scale_inv"] = torch.full((1, 1), 255, dtype=torch.uint8)  # e8m0's NaN
    with pytest.raises(ValueError, match="weight_scale_inv is not finite"):
        from_state_dict(entries)
    for dtype in (torch.int8, torch.int32, torch.float8_e5m2):
        entries["weight_scale_inv"] = torch.ones(1, 1).to(dtype)
        with pytest.raises(ValueError, match="weight_scale_inv must be scales in floating point"):
            from_state_dict(entries)


@pytest.mark.parametrize(
    ("entry", "whose"),
    [
        ("weight.quant_state.bitsandbytes__fp4", "bitsandbytes' FP4"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale", "compressed-tensors"),
        ("W_q", "HQQ"),
    ],
)
def test_other_formats_are_named(entry: str, whose: str) -> None:
    entries = {"a.weight": torch.zeros(4, 2, dtype=torch.uint8), f"a.{entry}": torch.zeros(1)}
    with pytest.raises(ValueError, match=f"a.{entry} is of a format that is not read: {whose}"):
        from_state_dict(entries, "a.")
