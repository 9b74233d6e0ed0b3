"""The storage of codes in groups: what it stands for, its parts, its states, and rounding to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prodial_kernels.quantization import from_state_dict, quantization_error
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.quantization.groups.layer import GroupedLinear
from prodial_kernels.quantization.groups.words import from_words, pack, to_words, unpack
from prodial_kernels.quantization.int8 import Int8Linear
from support.stored.grouped_weights import STORED, case, stored, words

EXACT = [each for each in STORED if each.get("zeros") != "floats"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_codes_without_gaps(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 77))
    codes[0] = (1 << bits) - 1
    expected = words(codes, bits)
    assert torch.equal(to_words(codes.to(torch.uint8), bits), expected)
    assert torch.equal(from_words(expected, bits, 77).long(), codes)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_rows_of_bytes(width: int) -> None:
    codes = torch.randint(1 << width, (3, 77), dtype=torch.uint8)
    packed = pack(codes, width)
    assert packed.shape == (3, -(-77 * width // 8))
    assert torch.equal(unpack(packed, width, 77), codes)


@pytest.mark.parametrize("arguments", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_weight_is_rounded_once(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    own = {name: value for name, value in arguments.items() if name not in ("repeats", "zeros")}
    of = case(**own)
    if arguments.get("zeros") == "none":
        of.zeros.fill_(1 << (of.bits - 1))
    # fp32 first: a product of fp16 or bf16 scales is exact in it.
    exact = of.weight(torch.float32).to(dtype)
    assert torch.equal(stored(**arguments).dequantize(dtype=dtype), exact)


@pytest.mark.parametrize("arguments", STORED, ids=str)
def test_parts_rows_and_states(arguments: dict[str, Any]) -> None:
    layer = stored(**arguments)
    weight = layer.dequantize()
    rows = torch.tensor([layer.out_features - 1, 0, 3, 3])
    assert torch.equal(layer.lookup(rows), weight[rows])
    step = layer.row_multiple
    if step < layer.out_features:
        part = layer.part(step, 2 * step)
        assert torch.equal(part.dequantize(), weight[step : 2 * step])
        rest = layer.part(2 * step, layer.out_features)
        assert torch.equal(rest.dequantize(), weight[2 * step :])
    state = {f"a.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    again = from_state_dict(state, "a.")
    assert isinstance(again, GroupedLinear)
    assert torch.equal(again.dequantize(), weight)
    assert again.dtype == layer.dtype
    other = stored(**arguments)
    other.codes.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), weight)


def test_it_stays_in_four_bits() -> None:
    layer = stored(256, 1024, group=128, dtype=torch.bfloat16).to(torch.float32)
    assert layer.codes.dtype == torch.uint8
    assert layer.scales.dtype == torch.bfloat16
    # A scale in 16 bits and a zero point in 8 for 128 codes.
    assert layer.packed_bytes * 8 / (256 * 1024) == 4 + 24 / 128
    assert "format='groups'" in repr(layer)
    assert "bits=4, group=128" in repr(layer)


@pytest.mark.parametrize("arguments", [STORED[0], STORED[5], STORED[7]], ids=str)
def test_the_layer_and_its_gradient(arguments: dict[str, Any]) -> None:
    layer = stored(**arguments).to(torch.float32)
    weight = layer.dequantize().double()
    x = torch.randn(5, layer.in_features, requires_grad=True)
    grad = torch.randn(5, layer.out_features)
    y = layer(x)
    y.backward(grad)
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 5, dtype=torch.uint8)}, "expected weight"),
        ({"weight_group_scales": torch.full((8, 2), torch.nan)}, "not finite"),
        ({"weight_group_scales": torch.ones(8, 3)}, "expected weight"),
        ({"weight_group_scales": torch.ones(3, 2)}, "expected weight"),
        ({"weight_group_zeros": torch.zeros(8, 1, dtype=torch.uint8)}, "must be as"),
        ({"weight_group_zeros": torch.zeros(8, 2, dtype=torch.int64)}, "must be as"),
        ({"weight_group_order": torch.full((64,), 2, dtype=torch.int32)}, "the group of each"),
        ({"weight_group_layout": torch.tensor([9, 64, 32, 0])}, "must be bits"),
        ({"weight_group_layout": torch.tensor([4, 64])}, "must be bits"),
    ],
)
def test_entries_that_do_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    entries = {**stored(8, 64).entries(), **change}
    with pytest.raises(ValueError, match=message):
        from_state_dict(entries)
    with pytest.raises(KeyError, match="weight_group_layout"):
        from_state_dict({n: t for n, t in entries.items() if n != "weight_group_layout"})


# --- Rounding. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", STORED, ids=str)
def test_what_it_holds_comes_out_in_the_same_codes(arguments: dict[str, Any]) -> None:
    layer = stored(**arguments)
    again = layer.rounded(layer.dequantize(dtype=torch.float32))
    for name, tensor in layer.entries().items():
        assert torch.equal(again.entries()[name], tensor), name


@pytest.mark.parametrize("arguments", STORED, ids=str)
def test_what_moved_is_rounded_to_the_nearest(arguments: dict[str, Any]) -> None:
    """Never worse than with the scales that were there, and a search finds no nearer codes."""
    layer = stored(**arguments)
    weight = layer.dequantize(dtype=torch.float32)
    moved = weight + 0.3 * weight.std() * torch.randn_like(weight)
    again = layer.rounded(moved)
    assert again.scales.dtype == layer.scales.dtype
    kept = quantization_error(moved, again)
    # The codes of the scales that were there.
    most = (1 << layer.bits) - 1
    steps = torch.arange(most + 1)
    best = torch.full_like(moved, torch.inf)
    for step in steps.tolist():
        layer.codes = pack(torch.full(weight.shape, step, dtype=torch.uint8), layer.width)
        best = torch.minimum(best, (layer.dequantize(dtype=torch.float32) - moved).abs())
    before = float(best.square().mean().sqrt() / moved.square().mean().sqrt())
    assert kept.relative_rms <= before * (1 + 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantising(symmetric: bool) -> None:
    weight = torch.randn(48, 160) * torch.logspace(-3, 1, 48)[:, None]
    weight[3] = 0
    layer = GroupedLinear.quantize(weight, None, bits=4, columns=64, symmetric=symmetric)
    assert (layer.zeros is None) == symmetric
    error = (layer.dequantize() - weight).square()
    padded = torch.nn.functional.pad(weight, (0, 32)).view(48, 3, 64)
    # Even steps over a range: an error of a step's 12th part in the mean, if nothing is cut off.
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    bound = (width / 15).square().mean(1) / 12
    assert (error.mean(1) <= bound * 1.5).all()
    assert not layer.dequantize()[3].any()


# --- Other storages with a scale for every row. -------------------------------------------------


def test_rows_and_parts_of_layers_with_a_scale_for_every_row() -> None:
    """Which a lookup took for those of tiles (e4m3), and scaled as LLM.int8 does (int8)."""
    codes, scales = torch.randint(-127, 128, (300, 70), dtype=torch.int8), torch.rand(300) + 0.1
    e4m3 = codes.float().to(torch.float8_e4m3fn)
    for layer in (
        Int8Linear(codes, scales, None, torch.float32, step=1.0),
        FP8Linear(e4m3, scales[:, None], None, torch.float32),
    ):
        rows = torch.tensor([299, 5, 131])
        assert torch.equal(layer.lookup(rows), layer.dequantize()[rows])
        assert torch.equal(layer.part(7, 150).dequantize(), layer.dequantize()[7:150])
