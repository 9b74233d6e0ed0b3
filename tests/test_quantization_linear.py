"""Adapters on quantised layers: gradients, what is kept for backward, merging, models, resuming."""

from __future__ import annotations

import copy
import gc
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    adapter_disabled,
    apply_prodial,
    load_adapter,
    merge_prodial,
    prodial_linear,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.mixers.projection import ProjectorOfView, is_explicit, operands_of
from prodial_kernels.quantization import FORMATS, QuantizedLinear, quantize_linear
from prodial_kernels.quantization.project import quantized_prodial_linear
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case
from tests.models import build, randomise_adapters, token_ids, training_step

K, N = 96, 72


def quantised(
    format: str = "nf4", *, shape: tuple[int, int] = (N, K), bias: bool = True, **kind: Any
) -> QuantizedLinear:
    torch.manual_seed(3)
    return quantize_linear(nn.Linear(shape[1], shape[0], bias=bias, **kind), format)


def adapted(base: nn.Linear | QuantizedLinear, **options: Any) -> ProdialLinear:
    layer = ProdialLinear.from_linear(base, **{"block_size": 6, "r": 4, **options})
    randomise_adapters(layer)
    return layer


def case_on(layer: QuantizedLinear, tokens: int | tuple[int, ...], **options: Any) -> LinearCase:
    """Operands whose weight is what ``layer`` stands for."""
    case = make_case(tokens, layer.in_features, layer.out_features, **options)
    return replace(case, weight=layer.dequantize().double())


def runner(layer: QuantizedLinear, **changes: Any) -> Any:
    def run(case: LinearCase) -> Tensor:
        options = {
            "blocks": case.blocks, "scale": case.scale, "lora_a": case.lora_a,
            "lora_b": case.lora_b, "bias": case.bias, "lora_scaling": case.lora_scaling,
            "diagonal": case.diagonal, **changes,
        }  # fmt: skip
        return quantized_prodial_linear(case.x, layer, **options)

    return run


# --- Output and every gradient, against fp64 on the dequantised weight. --------------------------


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


# --- What is kept for backward. -----------------------------------------------------------------


def kept_by(function: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


def dense_weights(shape: tuple[int, int] = (N, K)) -> int:
    """Floating-point tensors of a weight's shape that are alive."""
    gc.collect()
    return sum(map(partial(is_dense, shape), gc.get_objects()))


def is_dense(shape: tuple[int, ...], o: object) -> bool:
    return (
        type(o) is Tensor
        and o.shape == shape
        and o.is_floating_point()
        and o.itemsize > 1
        and not o.is_meta
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("format", FORMATS)
def test_ledger(format: str, impl: str, kernel_device: str) -> None:
    """X, H, with the kernels Y, aliases of the adapter and of the packed weight: nothing else."""
    dtype = torch.float16 if impl == "triton" else torch.float32
    layer = adapted(quantised(format, dtype=dtype).to(kernel_device), impl=impl)
    x = torch.randn(1, 5, K, device=kernel_device, dtype=dtype, requires_grad=True)
    outputs: list[Tensor] = []
    kept = kept_by(lambda: outputs.append(layer(x)))
    assert dense_weights() == 0
    own = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    fresh = [tensor for tensor in kept if not tensor.is_meta and tensor.data_ptr() not in own]
    activations = {x.data_ptr(), outputs[0].data_ptr()}
    h = [tensor for tensor in fresh if tensor.data_ptr() not in activations]
    assert [tensor.shape[0] for tensor in h] == [5]
    assert h[0].shape[1] <= 16
    assert len(fresh) == (3 if impl == "triton" else 2)
    outputs[0].float().sum().backward()
    assert dense_weights() == 0


def test_a_layer_without_an_adapter_keeps_its_packed_weight_alone() -> None:
    layer = quantised("nf4")
    x = torch.randn(2, 5, K, requires_grad=True)
    kept = kept_by(lambda: layer(x))
    own = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    assert {tensor.data_ptr() for tensor in kept if not tensor.is_meta} <= own
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(dx, torch.ones_like(y) @ layer.weight)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((N,), 10.0))


def test_frozen_adapters_keep_no_input() -> None:
    layer = adapted(quantised()).requires_grad_(False)
    x = torch.randn(2, 5, K, requires_grad=True)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept_by(lambda: layer(x)))
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, torch.ones(2, 5, N) @ layer.weight)


def test_one_dense_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the model: the temporary of a layer is gone before the next one's."""
    model = nn.Sequential(*(adapted(quantised(shape=(K, K))) for _ in range(4)))
    alive: list[int] = []
    unpack = type(model[0].base_layer).unpack

    def counted(self: Any, *args: Any) -> Tensor:
        alive.append(dense_weights((K, K)))
        return unpack(self, *args)

    monkeypatch.setattr(type(model[0].base_layer), "unpack", counted)
    model(torch.randn(3, K)).sum().backward()
    assert alive == [0] * 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_threads_and_changes_before_backward(reentrant: bool) -> None:
    layer = adapted(quantised(), lora_dropout=0.3).train()
    x = torch.randn(2, 5, K, requires_grad=True)

    def gradients(call: Any) -> list[Tensor]:
        torch.manual_seed(1)
        y = call(x)
        return list(torch.autograd.grad(y.square().sum(), [x, *trained]))

    trained = [p for _, p in layer.adapter_parameters()]
    expected = gradients(layer)
    if not reentrant:
        again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    else:
        torch.manual_seed(1)
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        found = [x.grad, *(p.grad for p in trained)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    layer.eval()
    alone = gradients(layer)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: gradients(layer), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))
    # Backward belongs to the weight that forward saw, whatever the layer holds by then.
    y = layer(x)
    layer.base_layer.load_state_dict(quantize_linear(nn.Linear(K, N), "nf4").state_dict())
    found = torch.autograd.grad(y.square().sum(), [x, *trained])
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    y = layer(x)
    layer.base_layer.codes.zero_()
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        y.sum().backward()


# --- The module. --------------------------------------------------------------------------------


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
    assert "impl='auto' (torch)" in repr(layer)
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


# --- Models. ------------------------------------------------------------------------------------


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(24, 96, bias=False)
        self.out_proj = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(value * torch.sigmoid(gate))


def quantise_all(model: nn.Module, format: str, names: tuple[str, ...]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names:
                setattr(module, name, quantize_linear(child, format))
    return model


def densify(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, child.to_linear())
    return model


CONFIG = ProdialConfig(r=4, n_blocks={"in_proj": 4, "out_proj": 8})


def small_model(format: str = "nf4", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return quantise_all(nn.Sequential(Mixer(), Mixer()), format, ("in_proj", "out_proj"))


@pytest.mark.parametrize("format", FORMATS)
def test_apply_merge_remove(format: str) -> None:
    model = small_model(format)
    x = torch.randn(2, 5, 24)
    before = model(x)
    bases = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    report = apply_prodial(model, CONFIG)
    dense_report = apply_prodial(densify(small_model(format)), CONFIG)
    assert report == dense_report
    torch.testing.assert_close(model(x), before)
    randomise_adapters(model)
    trained = model(x)
    merged = merge_prodial(copy.deepcopy(model))
    assert not any(isinstance(m, QuantizedLinear | ProdialLinear) for m in merged.modules())
    torch.testing.assert_close(merged(x), trained)
    remove_prodial(model)
    assert [m for m in model.modules() if isinstance(m, QuantizedLinear)] == bases
    assert torch.equal(model(x), before)


def test_targets_that_cannot_be_adapted() -> None:
    model = small_model()
    model[1].in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'1\.in_proj'.*with hooks"):
        apply_prodial(model, CONFIG)
    model = small_model()
    model[0].in_proj = model[0].in_proj.to_linear()
    apply_prodial(model, CONFIG)  # some layers quantised, some not
    assert isinstance(model[0].in_proj.base_layer, nn.Linear)
    assert isinstance(model[1].in_proj.base_layer, QuantizedLinear)


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_are_saved_and_resumed(format: str, tmp_path: Path) -> None:
    model = small_model(format)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    save_adapter(model, tmp_path)
    x = torch.randn(2, 5, 24)
    resumed = small_model(format)
    load_adapter(resumed, tmp_path)
    assert torch.equal(resumed(x), model(x))
    # On the same weights in full, or in another format, it is another base: said, not ignored.
    torch.manual_seed(0)
    with pytest.raises(AdapterError, match="was trained on other weights"):
        load_adapter(nn.Sequential(Mixer(), Mixer()), tmp_path)
    # On what the format stands for it is the same base.
    load_adapter(densify(small_model(format)), tmp_path)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_models_of_transformers_train_on_quantised_projectors(family: str) -> None:
    """Every path that a family takes gives what it gives on the dequantised weights."""
    names = ("in_proj", "out_proj", "x_proj", "dt_proj")
    config = ProdialConfig(r=2, target_modules=("in_proj", "out_proj"))
    steps = []
    for change in (lambda model: model, densify):
        model = change(quantise_all(build(family), "nf4", names))
        apply_prodial(model, config)
        randomise_adapters(model)
        steps.append(training_step(model, token_ids()))
    ours, theirs = steps
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert gradient is not None, name
        assert gradient.count_nonzero(), name
        torch.testing.assert_close(gradient, theirs.gradients[name])


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
