"""Copies, files, dtypes and devices of a ``ProdialLinear``: its adapter stays what it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear
from support.trained_layers import adapter, assert_same_adapter, plain, trained


def round_trip_deepcopy(layer: ProdialLinear) -> ProdialLinear:
    return copy.deepcopy(layer)


def round_trip_pickle(layer: ProdialLinear) -> ProdialLinear:
    return pickle.loads(pickle.dumps(layer))


def round_trip_torch_save(layer: ProdialLinear) -> ProdialLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def round_trip_state_dict(layer: ProdialLinear) -> ProdialLinear:
    fresh = trained(nn.Linear(42, 29), seed=9)
    fresh.load_state_dict(layer.state_dict())
    return fresh


@pytest.mark.parametrize(
    "round_trip",
    [round_trip_deepcopy, round_trip_pickle, round_trip_torch_save, round_trip_state_dict],
)
def test_copies_are_equal_and_independent(round_trip: Any) -> None:
    layer = trained()
    x = torch.randn(7, 42)
    expected, values = layer(x), adapter(layer)
    other = round_trip(layer)
    assert_same_adapter(other, values)
    assert torch.equal(other(x), expected)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == list(values)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.float16), lambda m: m.bfloat16().half(),
    ],
)  # fmt: skip
def test_casting_the_model_keeps_the_masters(cast: Any) -> None:
    layer = trained()
    values = adapter(layer)
    parameters = dict(layer.adapter_parameters())
    model = cast(nn.Sequential(layer))
    assert model[0].base_layer.weight.dtype in (torch.bfloat16, torch.float16)
    assert_same_adapter(layer, values)
    # The very parameters, so that an optimiser built before still trains them.
    assert all(parameters[name] is p for name, p in layer.adapter_parameters())
    assert all(p.requires_grad for p in parameters.values())
    x = torch.randn(7, 42, dtype=layer.base_layer.weight.dtype)
    assert layer(x).dtype == x.dtype
    assert_same_adapter(layer.float(), values)


def test_wider_casts_widen_the_masters_and_back() -> None:
    layer = trained()
    values = adapter(layer)
    layer.double()
    assert layer.prodial_scale.dtype == torch.float64
    assert layer(torch.randn(3, 42, dtype=torch.float64)).dtype == torch.float64
    layer.bfloat16()
    assert_same_adapter(layer, values)


def test_casting_after_a_step_keeps_gradients_usable() -> None:
    layer = trained()
    layer(torch.randn(3, 42)).sum().backward()
    layer.to(torch.bfloat16)
    assert layer.prodial_scale.grad.dtype == torch.float32
    layer(torch.randn(3, 42, dtype=torch.bfloat16)).sum().backward()
    assert layer.prodial_scale.grad.dtype == torch.float32


def test_narrow_masters_are_allowed() -> None:
    layer = trained(plain().bfloat16(), adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    x = torch.randn(7, 42, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert layer.prodial_scale.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0.05, atol=0.05
    )


def test_meta_device_and_back() -> None:
    layer = trained().to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.prodial_scale.dtype == torch.float32
    assert layer(torch.randn(3, 42, device="meta")).shape == (3, 29)
    layer.to_empty(device="cpu").reset_adapter()
    assert (layer.prodial_scale == 0).all()
    created = ProdialLinear.from_linear(nn.Linear(42, 29, device="meta"), block_size=6)
    assert {p.device.type for p in created.parameters()} == {"meta"}
