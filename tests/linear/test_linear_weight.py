"""The weight that a caller of ``ProdialLinear`` reads, and switching the adapter off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear, adapter_disabled
from support.trained_layers import plain, trained


@pytest.mark.parametrize("diagonal", ["relu", "free"])
@pytest.mark.parametrize("block_size", [1, 6])
def test_weight_is_exact_and_differentiable(block_size: int, diagonal: str) -> None:
    """Code that reads .weight trains the same adapter as code that calls the module."""
    layer = trained(plain().double(), block_size=block_size, diagonal=diagonal).double()
    x = torch.randn(7, 42, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for _, p in layer.adapter_parameters())]
    grad = torch.randn(7, 29, dtype=torch.float64)
    called = layer(x)
    read = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(read, called)
    expected = torch.autograd.grad(called, leaves, grad)
    for ours, theirs in zip(torch.autograd.grad(read, leaves, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weight_cannot_express_dropout() -> None:
    layer = trained(lora_dropout=0.1)
    message = (
        r"weight was read in training mode with lora_dropout=0\.1.*set lora_dropout=0, or call"
    )
    with pytest.raises(RuntimeError, match=message):
        layer.weight  # noqa: B018
    # nn.Module's own attribute lookup must not turn that into "no attribute".
    with pytest.raises(RuntimeError, match=message):
        getattr(layer, "weight", None)
    for readable in (layer.eval(), trained(lora_dropout=0.1, r=0), trained()):
        torch.testing.assert_close(readable.weight, readable.effective_weight())
    layer.train().enable_adapter(False)
    assert torch.equal(layer.weight, layer.base_layer.weight)


def test_our_own_calls_do_not_form_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise RuntimeError("the effective weight was formed")

    monkeypatch.setattr("prodial_kernels.linear.effective_weight", refuse)
    layer = trained()
    layer(torch.randn(3, 42)).sum().backward()
    with pytest.raises(RuntimeError, match="was formed"):
        layer.weight  # noqa: B018


# --- Switching the adapter off. -----------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_pretrained_layer(merged: bool) -> None:
    layer = trained().eval()
    if merged:
        layer.merge()
    x = torch.randn(7, 42)
    adapted = layer(x)
    layer.enable_adapter(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.weight, layer.base_layer.weight)
    layer.enable_adapter()
    assert torch.equal(layer(x), adapted)
    assert not torch.equal(adapted, layer.base_layer(x))


def test_adapter_disabled_restores_what_was() -> None:
    model = nn.Sequential(trained(), nn.Linear(29, 42), trained(seed=2))
    model[2].enable_adapter(False)
    with adapter_disabled(model):
        assert [model[0].adapter_enabled, model[2].adapter_enabled] == [False, False]
    assert [model[0].adapter_enabled, model[2].adapter_enabled] == [True, False]
    with pytest.raises(KeyError), adapter_disabled(model):
        raise KeyError
    assert [model[0].adapter_enabled, model[2].adapter_enabled] == [True, False]


def test_the_weight_cannot_be_set_or_tied() -> None:
    layer = ProdialLinear.from_linear(nn.Linear(8, 6), r=2)
    with pytest.raises(AttributeError, match="cannot be set or tied; set base_layer"):
        layer.weight = nn.Parameter(torch.zeros(6, 8))
