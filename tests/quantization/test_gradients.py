"""Adapters on quantised layers: output and every gradient, in every dtype and layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels import adapter_disabled, prodial_linear
from prodial_kernels.models.mixers.projection import operands_of
from prodial_kernels.ops.function import differentiable_projection
from prodial_kernels.quantization import FORMATS
from prodial_kernels.testing import assert_case_accurate
from support.quantized_layers import K, N, adapted, case_on, quantised, runner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "block_size", "diagonal"),
    [((2, 5), 1, "relu"), (7, 6, "free"), ((), 12, "relu"), ((2, 2, 3), 3, "free")],
)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(
    format: str, tokens: Any, block_size: int, diagonal: str, dtype: torch.dtype
) -> None:
    layer = quantised(format, dtype=dtype)
    case = case_on(layer, tokens, block_size=block_size, diagonal=diagonal)
    assert_case_accurate(case, runner(layer, impl="torch"), compute=dtype)


@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (130, 3), (3, 130)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_odd_sizes(format: str, shape: tuple[int, int]) -> None:
    layer = quantised(format, shape=shape)
    assert_case_accurate(case_on(layer, (2, 3)), runner(layer), compute=torch.float32)


@pytest.mark.parametrize("missing", [("blocks",), ("scale",), ("lora_a", "lora_b"), ("bias",)])
def test_gradients_without_a_part(missing: tuple[str, ...]) -> None:
    layer = quantised("nf4")
    case = replace(case_on(layer, (2, 5), block_size=6), **dict.fromkeys(missing))
    assert_case_accurate(case, runner(layer), compute=torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_the_kernels(format: str, kernel_device: str) -> None:
    layer = quantised(format, dtype=torch.float16).to(kernel_device)
    case = case_on(layer, (1, 20), block_size=6, device=kernel_device)
    assert_case_accurate(case, runner(layer, impl="triton"), compute=torch.float16)


def test_the_reference_is_the_definition() -> None:
    layer = quantised("int8")
    case = case_on(layer, (2, 5), block_size=6)
    assert_case_accurate(case, runner(layer, impl="reference"), compute=torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_dropout_and_every_bit_are_those_of_a_dense_layer(impl: str, kernel_device: str) -> None:
    """Same operation, same random draw: nothing but where the weight comes from differs."""
    dtype = torch.float16 if impl == "triton" else torch.float32
    base = quantised("nf4", dtype=dtype).to(kernel_device)
    results = []
    for layer in (base, base.to_linear()):
        module = adapted(layer, lora_dropout=0.5, impl=impl).train()
        torch.manual_seed(5)
        x = torch.randn(2, 6, K, device=kernel_device, dtype=dtype, requires_grad=True)
        y = module(x)
        y.float().square().mean().backward()
        results.append([y, x.grad, *(p.grad for _, p in module.adapter_parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)


def test_autocast() -> None:
    """As on a dense layer: the weight is rounded to autocast's dtype, and dX comes back in x's."""
    base = quantised("fp8")
    ours, theirs = adapted(base), adapted(base.to_linear())
    x = torch.randn(2, 5, K)
    outputs, gradients = [], []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaf)
            plain = layer.base_layer(leaf)
        assert y.dtype == plain.dtype == torch.bfloat16
        (y.float().sum() + plain.float().sum()).backward()
        outputs += [(y, plain)]
        gradients.append([leaf.grad, *(p.grad for _, p in layer.adapter_parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("active", [False, True], ids=["off", "on"])
def test_autocast_meets_an_input_of_its_own_dtype(packed: bool, active: bool) -> None:
    """As between two layers under autocast: x has 16 bits already, the weight its 32 still."""
    base = quantised("fp8")
    layer = adapted(base if packed else base.to_linear())
    layer.enable_adapter(active)
    x = torch.randn(2, 5, K, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        operands, rule = operands_of(layer, x)
        found = differentiable_projection(x, operands, rule)
    assert operands.weight.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    with pytest.raises((TypeError, RuntimeError), match="must have the same dtype"):
        layer(x)


def test_layouts() -> None:
    layer, x = adapted(quantised()), torch.randn(2, 5, K)
    expected = layer(x)
    torch.testing.assert_close(layer(x.mT.contiguous().mT), expected)
    turned = layer(x, channel_first=True)
    assert turned.is_contiguous()
    torch.testing.assert_close(turned, expected.mT)
    with adapter_disabled(layer):
        plain = layer(x)
        torch.testing.assert_close(plain, layer.base_layer(x.mT.contiguous().mT))
        torch.testing.assert_close(layer(x, channel_first=True), plain.mT)
    assert layer(torch.randn(0, K)).shape == (0, N)
    assert layer(torch.randn(2, 0, K)).shape == (2, 0, N)
    # A caller may overwrite the output, as after nn.Linear.
    x.requires_grad_()
    torch.testing.assert_close(layer(x).mul_(2), 2 * layer(x))
    layer(x).mul_(2).sum().backward()


def test_wrong_inputs_are_refused_as_by_a_dense_layer() -> None:
    layer = adapted(quantised())
    for module in (layer, layer.base_layer):
        with pytest.raises(ValueError, match=r"\[\.\.\., in_features\] = \[\.\.\., 96\], got"):
            module(torch.randn(2, K + 1))
        with pytest.raises(TypeError, match=r"same dtype, got torch\.bfloat16 and torch\.float32"):
            module(torch.randn(2, K, dtype=torch.bfloat16))


def test_prodial_linear_on_the_dense_weight_agrees() -> None:
    """A user with a quantised layer and the functional interface can go either way."""
    layer = quantised("fp8")
    case = case_on(layer, (2, 5), block_size=6).cast(torch.float32, torch.float32)
    assert torch.equal(
        runner(layer)(case),
        prodial_linear(
            case.x, layer.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
            lora_b=case.lora_b, bias=case.bias, lora_scaling=case.lora_scaling,
            diagonal=case.diagonal,
        ),
    )  # fmt: skip
