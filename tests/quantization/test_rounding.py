"""What a quantised weight reads back as: how much rounding may lose, and into which tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.quantization import FORMATS, int8, nf4, quantization_error, quantize_linear
from support.live_storages import LiveStorages
from support.stored.dense_weights import assert_same_bytes, dense, stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole and ragged blocks of 64 and of 128×128, odd counts, a single weight.
SHAPES = ((128, 256), (7, 9), (5, 13), (1, 1), (33, 65), (130, 3), (3, 130), (129, 257))


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


@pytest.mark.parametrize("format", FORMATS)
def test_a_large_weight_is_quantised_by_parts(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the dense weight are the codes, at most once more to put parts together."""
    for module in (int8, nf4):
        monkeypatch.setattr(module, "CHUNK", 2**12)
    layer = nn.Linear(128, 2048, bias=False).bfloat16()
    with LiveStorages() as made:
        quantize_linear(layer, format)
    beside = made.peak - layer.weight.untyped_storage().nbytes()
    assert beside < 2.1 * layer.weight.numel()
