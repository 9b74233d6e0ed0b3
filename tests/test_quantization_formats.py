"""The storage formats: the bytes that other libraries write, what rounding may lose, refusals."""

from __future__ import annotations

import copy
import io
import json
import math

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from prodial_kernels.quantization import (
    FORMATS,
    QuantizedLinear,
    from_state_dict,
    quantization_error,
    quantize_linear,
)
from prodial_kernels.quantization.blocks import dynamic_map
from prodial_kernels.quantization.nf4 import NF4_TABLE, NF4Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole and ragged blocks of 64 and of 128×128, odd counts, a single weight.
SHAPES = ((128, 256), (7, 9), (5, 13), (1, 1), (33, 65), (130, 3), (3, 130), (129, 257))


def waves(rows: int, columns: int) -> Tensor:
    """A weight that every machine computes alike, for the vectors below."""
    i = torch.arange(rows * columns, dtype=torch.float64)
    return (torch.sin(i * 1.37 + 0.2) * torch.exp(torch.cos(i * 0.011))).float().view(rows, columns)


def dense(
    weight: Tensor | tuple[int, int], *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    if not isinstance(weight, Tensor):
        weight = torch.randn(weight) * 0.1
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight = nn.Parameter(weight)
    return linear.to(dtype)


def stored(layer: QuantizedLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert bytes(tensor.flatten().view(torch.uint8)) == bytes(
            b[name].flatten().view(torch.uint8)
        )


# --- What bitsandbytes 0.50.2 stores and reads for waves(6, 22): two blocks of 64 and 4 weights. --

NF4_BYTES = (
    "9f902ee307fc11cf604fd10af802ee308fb11de505ec11bf713ed319ea12de416fc11cf604ed20af902ee307eb12ce51"
    "5ec21ae814dd318e923cd516db32ad723fe1"
)
NF4_ABSMAX = [2.718116521835327, 2.041743755340576, 0.9793471097946167]
NF4_STATE = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 22]}'
NESTED_STATE = (
    NF4_STATE[:-1]
    + ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.9130691289901733}'
)
PLACES = [0, 1, 63, 64, 100, 127, 128, 131]
NF4_VALUES = [
    "0x1.bfecep-2", "0x1.5beb3ep+1", "-0x1.e46ff2p+0", "-0x1.7cb994p-3", "-0x1.6be3f8p+0",
    "-0x1.1272d4p+0", "-0x1.8c0b28p-2", "-0x1.5d16c8p-1",
]  # fmt: skip
NESTED_VALUES = [
    "0x1.c092e2p-2", "0x1.5c6c30p+1", "-0x1.e5237cp+0", "-0x1.7c4360p-3", "-0x1.6b72fep+0",
    "-0x1.121d9ep+0", "-0x1.8eb2d4p-2", "-0x1.5f6ddep-1",
]  # fmt: skip


def test_nf4_is_stored_as_bitsandbytes_stores_it() -> None:
    layer = NF4Linear.quantize(waves(6, 22), None, double_quantization=False)
    entries = layer.state_dict()
    assert set(entries) == {
        "weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    assert entries["weight"].shape == (66, 1)
    assert bytes(entries["weight"].view(-1).tolist()).hex() == NF4_BYTES
    assert entries["weight.absmax"].tolist() == NF4_ABSMAX
    assert entries["weight.quant_map"].tolist() == list(NF4_TABLE)
    state = bytes(entries["weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert state == NF4_STATE
    values = layer.dequantize().view(-1)[PLACES]
    assert values.tolist() == [float.fromhex(value) for value in NF4_VALUES]


def test_nf4_with_double_quantisation_is_stored_as_bitsandbytes_stores_it() -> None:
    layer = quantize_linear(dense(waves(6, 22), bias=False), "nf4")
    entries = layer.state_dict()
    assert bytes(entries["weight"].view(-1).tolist()).hex() == NF4_BYTES
    assert entries["weight.absmax"].tolist() == [245, 193, 0]
    assert entries["weight.absmax"].dtype == torch.uint8
    assert entries["weight.nested_absmax"].tolist() == [0.9337220191955566]
    assert torch.equal(entries["weight.nested_quant_map"], dynamic_map())
    state = bytes(entries["weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert state == NESTED_STATE
    values = layer.dequantize().view(-1)[PLACES]
    assert values.tolist() == [float.fromhex(value) for value in NESTED_VALUES]


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert dynamic_map()[[0, 1, 2, 64, 100, 126, 127, 128, 129, 200, 254, 255]].tolist() == [
        -0.992968738079071, -0.9789062738418579, -0.96484375, -0.09859374910593033,
        -0.0074687497690320015, -5.500000384017767e-07, 0.0, 5.500000384017767e-07,
        3.250000190746505e-06, 0.23359374701976776, 0.992968738079071, 1.0,
    ]  # fmt: skip


def test_a_bitsandbytes_checkpoint_loads() -> None:
    """Entries written down, not made by our own quantiser; with a prefix and beside others."""
    entries = {
        "weight": torch.tensor(list(bytes.fromhex(NF4_BYTES)), dtype=torch.uint8)[:, None],
        "weight.absmax": torch.tensor([245, 193, 0], dtype=torch.uint8),
        "weight.quant_map": torch.tensor(NF4_TABLE),
        "weight.nested_absmax": torch.tensor([0.9337220191955566]),
        "weight.nested_quant_map": dynamic_map(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(NESTED_STATE.encode()), dtype=torch.uint8
        ),
        "bias": torch.arange(6.0),
    }
    state = {f"layers.0.in_proj.{name}": tensor for name, tensor in entries.items()}
    state["layers.0.norm.weight"] = torch.ones(3)
    layer = from_state_dict(state, "layers.0.in_proj.")
    assert (layer.in_features, layer.out_features, layer.dtype) == (22, 6, torch.float32)
    assert layer.bias is not None
    assert layer.bias.tolist() == [0, 1, 2, 3, 4, 5]
    assert not layer.bias.requires_grad
    values = layer.dequantize().view(-1)[PLACES]
    assert values.tolist() == [float.fromhex(value) for value in NESTED_VALUES]
    assert_same_bytes(stored(layer), entries)
    # quant_storage=bfloat16, which FSDP needs: the same bytes under another dtype.
    entries["weight"] = entries["weight"].view(-1).view(torch.bfloat16)[:, None]
    assert torch.equal(from_state_dict(entries).dequantize(), layer.dequantize())
    # A block of another size.
    state_64 = NF4_STATE.replace('"blocksize": 64', '"blocksize": 128')
    wider = from_state_dict({
        "weight": entries["weight"], "weight.quant_map": torch.tensor(NF4_TABLE),
        "weight.absmax": torch.tensor([1.0, 2.0]),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(state_64.encode()), dtype=torch.uint8
        ),
    }).dequantize().view(-1)  # fmt: skip
    codes = [byte >> shift & 15 for byte in bytes.fromhex(NF4_BYTES) for shift in (4, 0)]
    expected = torch.tensor([NF4_TABLE[code] for code in codes]).mul_(
        torch.tensor([1.0] * 128 + [2.0] * 4)
    )
    assert torch.equal(wider, expected)


def test_int8_is_stored_as_bitsandbytes_stores_it() -> None:
    layer = quantize_linear(dense(waves(3, 7), bias=False), "int8")
    entries = layer.state_dict()
    assert set(entries) == {"weight", "SCB", "weight_format"}
    assert entries["weight"].tolist() == [
        [25, 127, 25, -117, -72, 88, 107],
        [-46, -127, -5, 125, 54, -103, -95],
        [65, 121, -16, -127, -34, 113, 79],
    ]
    assert entries["SCB"].tolist() == [2.718116521835327, 2.671262502670288, 2.6643927097320557]
    assert entries["weight_format"].tolist() == 0
    assert entries["weight_format"].dtype == torch.uint8
    assert layer.dequantize()[0, :6].tolist() == [
        float.fromhex(value)
        for value in ("0x1.11f3bp-1", "0x1.5beb3ep+1", "0x1.11f3bp-1", "-0x1.408612p+1",
                      "-0x1.8a7da2p+0", "0x1.e227c6p+0")
    ]  # fmt: skip


def test_fp8_has_one_scale_for_every_tile() -> None:
    """W = weight · weight_scale_inv of its tile, the reading of DeepSeek-V3's own code."""
    weight = torch.randn(130, 257)
    weight[:128, 128:256] *= 1e4
    entries = quantize_linear(dense(weight, bias=False), "fp8").state_dict()
    assert set(entries) == {"weight", "weight_scale_inv"}
    codes, scales = entries["weight"], entries["weight_scale_inv"]
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            tile = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            largest = weight[tile].abs().max().item()
            assert math.isclose(scales[i, j].item(), largest / 448, rel_tol=1e-6)
            assert codes[tile].float().abs().max() == 448
            layer = from_state_dict(entries, dtype=torch.float32)
            assert torch.equal(layer.dequantize()[tile], codes[tile].float() * scales[i, j])


# --- What rounding may lose. --------------------------------------------------------------------


def allowed_error(weight: Tensor, format: str) -> Tensor:
    """Half a step of the format at every weight, as fp64, plus one rounding of the arithmetic."""
    exact = weight.double()
    if format == "int8":
        bound = exact.abs().amax(1, keepdim=True) / 254
    elif format == "fp8":
        scale = torch.empty_like(exact)
        for tile in (
            (slice(i, i + 128), slice(j, j + 128))
            for i in range(0, weight.shape[0], 128)
            for j in range(0, weight.shape[1], 128)
        ):
            scale[tile] = exact[tile].abs().max() / 448
        # 3 bits of mantissa; below 2^-6 the steps stay 2^-9.
        bound = torch.maximum(exact.abs() / 16, scale / 1024)
    else:
        blocks = nn.functional.pad(exact.view(-1), (0, -exact.numel() % 64)).view(-1, 64)
        absmax = blocks.abs().amax(1)
        offset_absmax = (absmax - absmax.mean()).abs()
        largest = nn.functional.pad(offset_absmax, (0, -len(absmax) % 256)).view(-1, 256).amax(1)
        # Half the widest gap of the two tables; what the scale loses moves the weight as much.
        scale_error = largest.repeat_interleave(256)[: len(absmax)] * 0.00705
        bound = (absmax * 0.152 + scale_error)[:, None].expand_as(blocks).reshape(-1)
        bound = bound[: exact.numel()].view_as(exact)
    return bound * (1 + 1e-5) + exact.abs() * 1e-6 + 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_error_is_at_most_half_a_step(
    format: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0] *= 10
    layer = quantize_linear(dense(weight, bias=False, dtype=dtype), format)
    result = layer.dequantize(dtype=torch.float32)
    assert result.shape == weight.shape
    assert ((result.double() - weight.double()).abs() <= allowed_error(weight, format)).all()
    # The layer's own dtype is one rounding of that.
    assert layer.dtype == dtype
    assert torch.equal(layer.dequantize(), result.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_vanishing_weights_stay_finite(format: str) -> None:
    weight = torch.zeros(130, 140)
    weight[1] = 1e-42
    weight[3, 5] = 1e-37
    layer = quantize_linear(dense(weight, bias=False), format)
    result = layer.dequantize()
    assert result.isfinite().all()
    if format != "nf4":
        assert not layer.state_dict()["weight"].float().any()
    assert result.abs().max() <= 1e-36


@pytest.mark.parametrize(("format", "lost"), [("nf4", 0.095), ("int8", 0.009), ("fp8", 0.027)])
def test_reported_error_and_bytes(format: str, lost: float) -> None:
    linear = dense((512, 768), bias=False)
    layer = quantize_linear(linear, format)
    error = quantization_error(linear.weight, layer)
    difference = (layer.dequantize() - linear.weight.detach()).double()
    assert 0.8 * lost < error.relative_rms < lost
    rms = difference.norm() / linear.weight.detach().double().norm()
    assert math.isclose(error.relative_rms, float(rms), rel_tol=1e-4)
    assert math.isclose(error.maximum, float(difference.abs().max()), rel_tol=1e-6)
    assert "relative rms" in str(error)
    count = 512 * 768
    nested = 4 * count // 64 // 256 + 4 + 4 * 256 + 4 * 16
    scales = {"nf4": count // 64 + nested, "int8": 4 * 512, "fp8": 4 * 4 * 6}[format]
    codes = count // 2 if format == "nf4" else count
    assert layer.packed_bytes == codes + scales


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights go in pieces; the pieces are those of the whole."""
    linear = dense((300, 130), bias=False)
    for format in FORMATS:
        whole = quantize_linear(linear, format)
        expected, values = stored(whole), whole.dequantize()
        for module in ("nf4", "int8"):
            monkeypatch.setattr(f"prodial_kernels.quantization.{module}.CHUNK", 4096)
        pieces = quantize_linear(linear, format)
        assert_same_bytes(stored(pieces), expected)
        assert torch.equal(pieces.dequantize(), values)
        monkeypatch.undo()


# --- State dicts, copies, casts. ----------------------------------------------------------------


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


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_into_a_given_tensor(format: str) -> None:
    layer = quantize_linear(dense((33, 65)), format)
    for dtype in DTYPES:
        out = torch.full((33, 65), torch.nan, dtype=dtype)
        assert layer.dequantize(out) is out
        assert torch.equal(out, layer.dequantize(dtype=dtype))
    for wrong in (torch.empty(65, 33), torch.empty(65, 33).T, torch.empty(33, 65, device="meta")):
        with pytest.raises(ValueError, match=r"out must be contiguous with shape \[33, 65\]"):
            layer.dequantize(wrong)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, layer.weight)
    assert linear.bias is not layer.bias


# --- Refusals. ----------------------------------------------------------------------------------


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
