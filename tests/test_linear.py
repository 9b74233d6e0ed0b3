"""``ProdialLinear``, a drop-in for ``nn.Linear``: what callers see, merging, dtypes, switches."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear, adapter_disabled
from prodial_kernels.linear import ADAPTER_PARAMETERS, resolve_block_size

SHAPES = ((42, 29), (29, 42), (6, 1), (1, 6))
PARTS = list(itertools.product([0, 4], [False, True], [False, True]))[1:]


def plain(in_features: int = 42, out_features: int = 29, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def trained(linear: nn.Linear | None = None, *, seed: int = 1, **options: Any) -> ProdialLinear:
    """An adapted layer whose every part has moved."""
    options = {"block_size": 6, "r": 4, "lora_alpha": 2.0, **options}
    layer = ProdialLinear.from_linear(plain() if linear is None else linear, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in layer.adapter_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return layer


def adapter(layer: ProdialLinear) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.adapter_parameters()}


def assert_same_adapter(a: ProdialLinear, b: dict[str, Tensor]) -> None:
    assert adapter(a).keys() == b.keys()
    for name, tensor in adapter(a).items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


# --- What a caller of nn.Linear sees. -----------------------------------------------------------


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
    assert (layer.prodial_scale == 1).all()
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


# --- The weight that a caller reads. ------------------------------------------------------------


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


def test_dropout_follows_train_and_eval() -> None:
    layer = trained(lora_dropout=0.5)
    x = torch.randn(31, 42)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_our_own_calls_do_not_form_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise RuntimeError("the effective weight was formed")

    monkeypatch.setattr("prodial_kernels.linear.effective_weight", refuse)
    layer = trained()
    layer(torch.randn(3, 42)).sum().backward()
    with pytest.raises(RuntimeError, match="was formed"):
        layer.weight  # noqa: B018


def test_the_output_may_be_changed_in_place() -> None:
    layer = trained()
    x = torch.randn(7, 42, requires_grad=True)
    (expected,) = torch.autograd.grad((layer(x) * 2).sum(), x)
    (result,) = torch.autograd.grad(layer(x).mul_(2).sum(), x)
    torch.testing.assert_close(result, expected)


# --- Merging. -----------------------------------------------------------------------------------


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


# --- Copies, files, dtypes, devices. ------------------------------------------------------------


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
    assert (layer.prodial_scale == 1).all()
    created = ProdialLinear.from_linear(nn.Linear(42, 29, device="meta"), block_size=6)
    assert {p.device.type for p in created.parameters()} == {"meta"}


def test_extra_repr() -> None:
    text = repr(trained(lora_dropout=0.1, diagonal="free", impl="torch"))
    for part in (
        "in_features=42, out_features=29", "bias=True", "r=4", "lora_alpha=2", "lora_dropout=0.1",
        "n_blocks=7, block_size=6", "diagonal='free'", "scale=True", "impl='torch' (torch)",
        "base_layer",
    ):  # fmt: skip
        assert part in text, part
    layer = trained(train_diagonal=False)
    layer.merge()
    layer.enable_adapter(False)
    assert "n_blocks" not in repr(layer)
    assert "merged" in repr(layer)
    assert "adapter disabled" in repr(layer)
