"""Merging an adapter into its layer, unmerging it, and leaving with a plain ``nn.Linear``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trained_layers import adapter, assert_same_adapter, plain, trained


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_merge_and_unmerge(bias: bool, dtype: torch.dtype) -> None:
    layer = trained(plain(bias=bias).to(dtype)).eval()
    x = torch.randn(7, 42, dtype=dtype)
    before, weight = layer(x), layer.weight.detach().clone()
    keys, values = list(layer.state_dict()), adapter(layer)
    assert not layer.merged
    layer.merge()
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    # W' is rounded to its dtype; the unmerged product never forms it.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    assert list(layer.state_dict()) == keys
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer(x), before)
    assert_same_adapter(layer, values)


def test_a_merged_layer_does_not_train() -> None:
    layer = trained()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged, so its adapter would get no gradient; call "
                                           r"unmerge\(\)"):  # fmt: skip
        layer(torch.randn(3, 42))
    with torch.no_grad():
        layer(torch.randn(3, 42))
    layer.eval()(torch.randn(3, 42))
    layer.unmerge()
    layer.train()(torch.randn(3, 42))


def test_a_merged_layer_can_be_cast_and_copied() -> None:
    layer = trained().eval()
    layer.merge()
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.merged
    assert cast.weight.dtype == torch.bfloat16
    fresh = copy.deepcopy(layer)
    fresh.unmerge()
    assert torch.equal(fresh.to(torch.bfloat16).weight, cast.weight)
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear(bias: bool) -> None:
    layer = trained(plain(bias=bias), lora_dropout=0.5).eval()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features) == (42, 29)
    assert (linear.bias is not None) == bias
    assert linear.training == layer.training
    assert torch.equal(linear.weight, layer.weight)
    x = torch.randn(7, 42)
    expected = layer(x)
    torch.testing.assert_close(linear(x), expected)
    # A copy: neither layer follows the other.
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)


def test_to_linear_of_a_disabled_or_merged_layer_is_still_the_adapted_one() -> None:
    layer = trained().eval()
    weight = layer.weight.detach().clone()
    layer.enable_adapter(False)
    assert torch.equal(layer.to_linear().weight, weight)
    layer.enable_adapter()
    layer.merge()
    assert torch.equal(layer.to_linear().weight, weight)
