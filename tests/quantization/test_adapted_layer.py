"""``ProdialLinear`` on a quantised layer: its weight, merging, casts, copies, use in mixers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear, adapter_disabled
from prodial_kernels.models.mixers.projection import ProjectorOfView, is_explicit, operands_of
from prodial_kernels.quantization import FORMATS, quantize_linear
from support.quantized_layers import K, N, adapted, is_dense, kept_by, quantised


@pytest.mark.parametrize("format", FORMATS)
def test_effective_weight_merging_and_back(format: str) -> None:
    layer = adapted(quantised(format)).eval()
    twin = adapted(layer.base_layer.to_linear()).eval()
    x = torch.randn(2, 5, K)
    assert torch.equal(layer.weight, twin.weight)
    layer.weight.sum().backward()
    assert all(p.grad is not None for _, p in layer.adapter_parameters())
    before = layer(x)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x), before)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    assert torch.equal(layer(x), before)
    with adapter_disabled(layer):
        assert torch.equal(layer.weight, layer.base_layer.dequantize())
    assert "impl='auto' (torch: the weight is on cpu)" in repr(layer)
    assert layer.bias is layer.base_layer.bias


@pytest.mark.parametrize(("format", "lost"), [("nf4", 0.1), ("int8", 0.012), ("fp8", 0.028)])
def test_a_requantised_merge_reports_its_error(format: str, lost: float) -> None:
    layer = adapted(quantised("nf4"))
    quantized, error = layer.to_quantized(format)
    exact = layer.weight.detach()
    assert quantized.FORMAT == format  # noqa: SIM300
    difference = (quantized.dequantize() - exact).double()
    assert math.isclose(error.maximum, float(difference.abs().max()), rel_tol=1e-5)
    assert math.isclose(
        error.relative_rms, float(difference.norm() / exact.double().norm()), rel_tol=1e-4
    )
    assert 0.3 * lost < error.relative_rms < lost


def test_casts_keep_masters_and_codes() -> None:
    layer = adapted(quantised("fp8"))
    codes = layer.base_layer.state_dict()["weight"].clone()
    layer.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for _, p in layer.adapter_parameters())
    assert layer.base_layer.state_dict()["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(
        layer.base_layer.state_dict()["weight"].view(torch.uint8), codes.view(torch.uint8)
    )
    assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_of_an_adapted_layer() -> None:
    layer = adapted(quantised())
    other = ProdialLinear.from_linear(quantize_linear(nn.Linear(K, N), "nf4"), block_size=6, r=4)
    assert "base_layer.weight.absmax" in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_mixers_project_on_quantised_weights() -> None:
    base = quantised("int8")
    layer = adapted(base)
    assert is_explicit(layer)
    assert is_explicit(base)
    assert not is_explicit(adapted(base, impl="reference"))
    with pytest.raises(ValueError, match=r"impl='reference' has no explicit backward"):
        operands_of(adapted(base, impl="reference"), torch.randn(1, 2, K))
    for projection in (layer, base):
        operands, rule = operands_of(projection, torch.randn(1, 2, K))
        assert operands.weight.is_meta
        assert rule.packed is not None
        assert torch.equal(rule.packed.dense(torch.float32), base.dequantize())
    view = ProjectorOfView(layer)
    columns = torch.randn(K, 5, requires_grad=True)
    for enabled in (True, False):
        layer.enable_adapter(enabled)
        expected = layer.weight @ columns
        torch.testing.assert_close(view.weight @ columns, expected)
        kept = kept_by(lambda: view.weight @ columns)
        assert not any(is_dense((N, K), tensor) for tensor in kept)
    assert view.weight.shape == (N, K)
    assert view.weight.dtype == torch.float32
    assert view.weight.device.type == "cpu"
