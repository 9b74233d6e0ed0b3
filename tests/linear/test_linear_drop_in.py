"""``ProdialLinear`` in place of ``nn.Linear``: what it starts as, its parts, refused options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear
from prodial_kernels.config import resolve_block_size
from prodial_kernels.linear import ADAPTER_PARAMETERS
from support.trained_layers import plain, trained

SHAPES = ((42, 29), (29, 42), (6, 1), (1, 6))
PARTS = list(itertools.product([0, 4], [False, True], [False, True]))[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_drop_in(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
    linear = plain(in_features, out_features, bias).to(dtype)
    layer = ProdialLinear.from_linear(linear, r=2)
    assert (layer.in_features, layer.out_features) == (in_features, out_features)
    assert layer.bias is linear.bias
    assert layer.weight.shape == (out_features, in_features)
    assert layer.weight.dtype == dtype
    assert layer.weight.device == linear.weight.device
    assert torch.equal(layer.weight, linear.weight)
    for lead in ((), (7,), (2, 3), (0,), (2, 0, 3)):
        x = torch.randn(*lead, in_features, dtype=dtype)
        expected = linear(x)
        result = layer(input=x)
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        # The bias is added after the product was rounded: another rounding of values up to 4.
        atol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(result, expected, rtol=0, atol=atol)


def test_an_untrained_adapter_changes_no_bit() -> None:
    """D_b = I, s = 1 and B = 0 are exact in every dtype; without bias the products are the same."""
    for dtype in (torch.float64, torch.float32):
        linear = plain(bias=False).to(dtype)
        x = torch.randn(7, 42, dtype=dtype)
        for block_size in (1, 6):
            layer = ProdialLinear.from_linear(linear, block_size=block_size)
            assert torch.equal(layer(x), x @ linear.weight.T)


def test_the_linear_layer_itself_is_kept_and_frozen() -> None:
    linear = plain()
    layer = ProdialLinear.from_linear(linear)
    assert layer.base_layer is linear
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    assert all(p.requires_grad for _, p in layer.adapter_parameters())
    layer(torch.randn(3, 42)).sum().backward()
    assert linear.weight.grad is None


@pytest.mark.parametrize("diagonal", ["relu", "free"])
def test_every_part_gets_a_gradient_in_the_first_two_steps(diagonal: str) -> None:
    """B = 0 hides A from the first step, as in every LoRA; nothing is hidden from the second."""
    layer = ProdialLinear.from_linear(plain(), block_size=6, r=4, diagonal=diagonal)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    x, target = torch.randn(64, 42), torch.randn(64, 29)
    for step in range(2):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        for name, parameter in layer.adapter_parameters():
            assert parameter.grad is not None
            if step or name != "prodial_a":
                assert parameter.grad.count_nonzero() == parameter.numel(), (step, name)
        optimizer.step()


def test_initial_values() -> None:
    layer = ProdialLinear.from_linear(plain(), n_blocks=7, r=16)
    assert layer.block_size == 6
    shapes = {name: tuple(p.shape) for name, p in layer.adapter_parameters()}
    assert shapes == {
        "prodial_blocks": (7, 6, 6), "prodial_scale": (29,), "prodial_a": (16, 42),
        "prodial_b": (29, 16),
    }  # fmt: skip
    assert not layer.prodial_blocks.any()
    assert (layer.prodial_scale == 0).all()
    assert not layer.prodial_b.any()
    # PEFT's LoRA: kaiming_uniform with a = sqrt(5), that is uniform in ±1/sqrt(in_features).
    bound = 1 / math.sqrt(42)
    assert 0.9 * bound < layer.prodial_a.abs().max() <= bound
    assert layer.lora_scaling == 1.0
    assert ProdialLinear.from_linear(plain(), r=8, lora_alpha=2).lora_scaling == 0.25


def test_reset_adapter() -> None:
    layer = trained()
    layer.reset_adapter()
    assert torch.equal(layer.weight, layer.base_layer.weight)
    assert layer.prodial_a.any()
    assert all(p.requires_grad for _, p in layer.adapter_parameters())


def test_weight_decay_pulls_towards_the_pretrained_layer() -> None:
    """As the optimiser of somebody else's trainer decays: every parameter."""
    layer = trained()
    far = (layer.weight - layer.base_layer.weight).norm()
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=1.0
    )
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for _ in range(100):
        optimizer.step()
    assert (layer.weight - layer.base_layer.weight).norm() < 1e-4 * far


def test_small_deviations_of_the_scale_survive_a_16_bit_adapter() -> None:
    layer = ProdialLinear.from_linear(plain(), r=0, adapter_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.prodial_scale.fill_(3e-3)
    x = torch.randn(7, 42)
    exact = 1.003 * nn.functional.linear(x, layer.base_layer.weight) + layer.bias
    for impl in ("torch", "reference"):
        layer.impl = impl
        torch.testing.assert_close(layer(x), exact, rtol=2e-5, atol=2e-5)
    assert torch.autograd.grad(layer(x).sum(), layer.prodial_scale)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("r", "train_scale", "train_diagonal"), PARTS)
def test_absent_parts(r: int, train_scale: bool, train_diagonal: bool) -> None:
    layer = trained(r=r, train_scale=train_scale, train_diagonal=train_diagonal)
    present = [name for name, _ in layer.adapter_parameters()]
    expected = [
        *(["prodial_blocks"] if train_diagonal else []),
        *(["prodial_scale"] if train_scale else []),
        *(["prodial_a", "prodial_b"] if r else []),
    ]
    assert present == expected
    assert [name for name in ADAPTER_PARAMETERS if getattr(layer, name) is not None] == expected
    assert sorted(layer.state_dict()) == sorted([*expected, "base_layer.bias", "base_layer.weight"])
    x = torch.randn(7, 42)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.equal(layer.weight, layer.base_layer.weight)
    repr(layer)


def test_blocks_on_any_layer() -> None:
    assert resolve_block_size(42, None, None) == 1
    assert resolve_block_size(42, 7, None) == 6
    assert resolve_block_size(42, None, 6) == 6
    with pytest.raises(ValueError, match=r"n_blocks=5 must divide in_features=42; its divisors "
                                         r"are \[1, 2, 3, 6, 7, 14, 21, 42\]"):  # fmt: skip
        ProdialLinear.from_linear(plain(), n_blocks=5)
    for value in (5, 0, -6, 84):
        with pytest.raises(ValueError, match=f"block_size={value} must divide in_features=42"):
            ProdialLinear.from_linear(plain(), block_size=value)
    with pytest.raises(ValueError, match=r"not both \(got n_blocks=7, block_size=6\)"):
        ProdialLinear.from_linear(plain(), n_blocks=7, block_size=6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": -1}, ValueError, r"r must be >= 0 .*, got -1"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1\.0"),
        ({"diagonal": "x"}, ValueError, "diagonal must be one of 'relu', 'free', got 'x'"),
        ({"impl": "x"}, ValueError, "impl must be one of .*, got 'x'"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be .* got torch.int8"),
        ({"r": 0, "train_scale": False, "train_diagonal": False}, ValueError, "nothing would be"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    linear = plain()
    with pytest.raises(error, match=message):
        ProdialLinear.from_linear(linear, **options)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("wrong", [nn.Conv1d(3, 3, 1), None, torch.ones(3, 3)])
def test_only_linear_layers(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"must be an nn.Linear, got {type(wrong).__name__}"):
        ProdialLinear.from_linear(wrong)


def test_dropout_follows_train_and_eval() -> None:
    layer = trained(lora_dropout=0.5)
    x = torch.randn(31, 42)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_output_may_be_changed_in_place() -> None:
    layer = trained()
    x = torch.randn(7, 42, requires_grad=True)
    (expected,) = torch.autograd.grad((layer(x) * 2).sum(), x)
    (result,) = torch.autograd.grad(layer(x).mul_(2).sum(), x)
    torch.testing.assert_close(result, expected)


def test_extra_repr() -> None:
    text = repr(trained(lora_dropout=0.1, diagonal="free", impl="torch"))
    for part in (
        "in_features=42, out_features=29", "bias=True", "r=4", "lora_alpha=2", "lora_dropout=0.1",
        "n_blocks=7, block_size=6", "diagonal='free'", "scale=True", "impl='torch'",
        "base_layer",
    ):  # fmt: skip
        assert part in text, part
    layer = trained(train_diagonal=False)
    layer.merge()
    layer.enable_adapter(False)
    assert "n_blocks" not in repr(layer)
    assert "merged" in repr(layer)
    assert "adapter disabled" in repr(layer)
