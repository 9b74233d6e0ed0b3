"""Merging an adapter into its layer, unmerging it, and leaving with a plain ``nn.Linear``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear
from support.trained_layers import adapter, assert_same_adapter, plain, trained


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


def _load(layer: ProdialLinear) -> None:
    state = {name: value + 0.3 for name, value in layer.state_dict().items() if "prodial" in name}
    layer.load_state_dict(state, strict=False)


def _assign(layer: ProdialLinear) -> None:
    state = {name: value + 0.3 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _average(layer: ProdialLinear) -> None:
    parameters = [parameter for _, parameter in layer.adapter_parameters()]
    torch._foreach_lerp_(parameters, [torch.ones_like(p) for p in parameters], 0.1)


def _copy(layer: ProdialLinear) -> None:
    layer.prodial_scale.copy_(torch.full_like(layer.prodial_scale, 0.7))


def _other_memory(layer: ProdialLinear) -> None:
    layer.prodial_b.data = torch.ones_like(layer.prodial_b)


def _base(layer: ProdialLinear) -> None:
    layer.base_layer.weight.mul_(2)


def _step(layer: ProdialLinear) -> None:
    for _, parameter in layer.adapter_parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([p for _, p in layer.adapter_parameters()], lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [_load, _assign, _average, _copy, _other_memory, _base, _step, ProdialLinear.reset_adapter,
     lambda layer: setattr(layer, "lora_alpha", 7.0), lambda layer: setattr(layer, "r", 1)],
)  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_a_merged_layer_follows_its_parameters(
    change: Callable[[ProdialLinear], None], compiled: bool
) -> None:
    layer = trained().eval()
    layer.merge()
    call = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    x = torch.randn(7, 42)
    with torch.no_grad():
        before = call(x)
        change(layer)
        if compiled and change not in (_load, _assign, ProdialLinear.reset_adapter):
            # Nothing looks in a compiled call, as the docstring says: merged again by hand.
            layer.merge()
        after, weight = call(x), layer.weight.clone()
        assert layer.merged
        layer.unmerge()
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(after, layer(x))
        torch.testing.assert_close(weight, layer.weight)


def test_a_merge_renewed_in_inference_mode_serves_outside_of_it() -> None:
    layer = trained().eval()
    layer.merge()
    with torch.no_grad():
        _copy(layer)
    x = torch.randn(7, 42, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert x.grad is not None


def test_nothing_is_merged_again_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = trained().eval()
    layer.merge()
    layer(torch.randn(7, 42))
    monkeypatch.setattr(ProdialLinear, "adapted_weight", None)
    layer(torch.randn(7, 42))
    layer.merge()
