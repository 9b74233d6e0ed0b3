"""The storage formats are those of other libraries: the bytes they write, and what they read."""

from __future__ import annotations

import math

import torch

from prodial_kernels.quantization import from_state_dict, quantize_linear
from prodial_kernels.quantization.blockwise import dynamic_map
from prodial_kernels.quantization.nf4 import NF4_TABLE, NF4Linear
from support.stored.dense_weights import NF4_STATE, assert_same_bytes, dense, stored, waves

# What bitsandbytes 0.50.2 stores and reads for waves(6, 22): two blocks of 64 and 4 weights.
NF4_BYTES = (
    "9f902ee307fc11cf604fd10af802ee308fb11de505ec11bf713ed319ea12de416fc11cf604ed20af902ee307eb12ce51"
    "5ec21ae814dd318e923cd516db32ad723fe1"
)
NF4_ABSMAX = [2.718116521835327, 2.041743755340576, 0.9793471097946167]
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


def test_scales_take_the_nearest_entry_on_any_device() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = NF4Linear.quantize(weight, None)
    assert layer.nested_absmax is not None
    assert layer.nested_offset is not None
    scales = weight.view(-1, 64).abs().amax(1)
    assert layer.nested_offset == scales.double().mean().float()
    outer = layer.nested_absmax.repeat_interleave(256)[: scales.numel()]
    apart = ((scales - layer.nested_offset) / outer)[:, None] - dynamic_map()
    taken = apart.gather(1, layer.absmax.long()[:, None]).abs()[:, 0]
    torch.testing.assert_close(taken, apart.abs().amin(1), rtol=0, atol=1e-7)
