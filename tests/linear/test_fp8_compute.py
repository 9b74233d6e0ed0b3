"""``compute="fp8"``: what takes it, what refuses it, and that models and runs carry it along."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    load_adapter,
    merge_prodial,
    quantize_model,
    save_adapter,
)
from prodial_kernels._validation import check_fp8
from prodial_kernels.functional import checked_linear
from prodial_kernels.kernels.projector.operands import Kept, Needs
from prodial_kernels.linear import adapted_layers, unrounded
from prodial_kernels.models.mixers.projection import operands_of
from prodial_kernels.ops.projection import project, project_backward
from prodial_kernels.quantization import quantize_linear
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.training.config import ConfigError, FinetuneConfig
from prodial_kernels.training.memory.peak import Job, peak_of
from prodial_kernels.training.memory.shapes import describe_model
from support.fp8.layers import fp8_case, stored
from support.models import build, randomise_adapters, token_ids, training_step
from support.quantized_layers import runner

CONFIG = ProdialConfig(r=4, compute="fp8")


def linear(k: int = 160, n: int = 72) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n)


# --- What takes it, and what does not. ----------------------------------------------------------


def test_a_layer_rounds_and_an_unrounded_one_does_not() -> None:
    base = quantize_linear(linear(), "fp8")
    layer = ProdialLinear.from_linear(base, r=4, compute="fp8")
    randomise_adapters(layer)
    x = torch.randn(6, 160)
    plain = ProdialLinear.from_linear(base, r=4)
    plain.load_state_dict(layer.state_dict())
    error = (layer(x) - plain(x)).norm() / plain(x).norm()
    assert 0.003 < error < 0.06
    with unrounded(layer):
        assert torch.equal(layer(x), plain(x))
    assert not torch.equal(layer(x), plain(x))
    assert "compute='fp8'" in repr(layer)
    assert "compute" not in repr(plain)


@pytest.mark.parametrize("make", [linear, lambda: quantize_linear(linear(), "nf4")])
def test_other_weights_are_refused_with_the_way_out(make: Any) -> None:
    with pytest.raises(ValueError, match=r"compute='fp8'.*(dense|nf4).*quantize_model.*'fp8'"):
        ProdialLinear.from_linear(make(), compute="fp8")


def test_a_scale_per_row_is_refused() -> None:
    by_tile = quantize_linear(linear(), "fp8")
    assert isinstance(by_tile, FP8Linear)
    by_row = FP8Linear(by_tile.codes, torch.ones(72, 1), None, torch.float32)
    with pytest.raises(ValueError, match="scale per row"):
        ProdialLinear.from_linear(by_row, compute="fp8")


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="compute must be one of 'same', 'fp8'"):
        ProdialConfig(compute="int8")


def test_a_dense_weight_is_refused_by_the_operation() -> None:
    case = fp8_case(stored(40, 48), 3).cast(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="stored in fp8, got a dense one"):
        checked_linear(case.x, case.operands, case.options("torch"))


def test_blocks_larger_than_a_tile_are_refused_by_the_kernels() -> None:
    layer = stored(40, 384)
    case = fp8_case(layer, 3, block_size=192).cast(torch.float16, torch.float32)
    with pytest.raises(ValueError, match=r"at most 128×128.*got 192.*impl='torch'"):
        case.run(runner(layer, impl="triton"))
    case.run(runner(layer, impl="torch"))


class OnGpu:
    """As much of a CUDA tensor as the check looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.bfloat16


def test_a_gpu_without_fp8_is_refused() -> None:
    old = {"device_capability": lambda _: (8, 6)}
    with (
        mock.patch.multiple("prodial_kernels._validation", **old),
        mock.patch("torch.cuda.get_device_name", return_value="RTX A6000"),
        pytest.raises(RuntimeError, match=r"A6000 is older than Ada \(sm_89\).*compute='same'"),
    ):
        check_fp8(OnGpu(), None, stored=True, asked="auto", chosen="triton")  # type: ignore[arg-type]


def test_a_gpu_does_not_fall_back_in_silence() -> None:
    with pytest.raises(TypeError, match=r"impl='auto' cannot run on torch\.bfloat16 here"):
        check_fp8(OnGpu(), None, stored=True, asked="auto", chosen="torch")  # type: ignore[arg-type]
    check_fp8(OnGpu(), None, stored=True, asked="torch", chosen="torch")  # type: ignore[arg-type]


# --- Inputs at the edges. -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("impl", ["torch", "reference", "triton"])
def test_what_is_not_finite_spoils_its_own_row_alone(impl: Any) -> None:
    layer = stored(40, 256)
    case = fp8_case(layer, 5).cast(torch.float16, torch.float32)
    clean = case.run(runner(layer, impl=impl))["output"]
    case.x[1, 3], case.x[3, 200] = float("inf"), float("nan")
    found = case.run(runner(layer, impl=impl))["output"]
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_outlier_costs_its_own_group_alone(impl: str) -> None:
    layer = stored(40, 256)
    case = fp8_case(layer, 6)
    case.x[2, 7] = 1e4
    case.x[4] = 0
    case = replace(case, bias=None).cast(torch.float16, torch.float32)
    found = case.run(runner(layer, impl=impl))  # type: ignore[arg-type]
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["output"][4].any()


# --- Models. ------------------------------------------------------------------------------------


def small(family: str, config: ProdialConfig = CONFIG) -> nn.Module:
    model = build(family)
    quantize_model(model, "fp8")
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_model_trains_close_to_16_bits(family: str) -> None:
    model = small(family)
    assert {layer.compute for layer in adapted_layers(model).values()} == {"fp8"}
    twin = copy.deepcopy(model)
    for layer in adapted_layers(twin).values():
        layer.compute = "same"
    ids = token_ids()
    here, there = training_step(model, ids), training_step(twin, ids)
    assert here.gradients.keys() == there.gradients.keys()
    left, right = (
        torch.cat([g.flatten() for g in step.gradients.values() if g is not None])
        for step in (here, there)
    )
    assert torch.cosine_similarity(left, right, 0) > 0.99
    assert not torch.equal(left, right)


def test_it_is_saved_with_the_adapter_and_merging_gives_the_unrounded_model(tmp_path: Path) -> None:
    model = small("mamba2")
    save_adapter(model, tmp_path)
    resumed = build("mamba2")
    quantize_model(resumed, "fp8")
    load_adapter(resumed, tmp_path)
    assert {layer.compute for layer in adapted_layers(resumed).values()} == {"fp8"}
    ids = token_ids()
    with torch.no_grad(), unrounded(model):
        expected = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(merge_prodial(model)(ids).logits, expected)


def test_the_command_lines_option() -> None:
    config = FinetuneConfig(compute="fp8", quantize="fp8")
    assert config.adapter(r=4).compute == "fp8"
    assert FinetuneConfig().adapter(r=4).compute == "same"
    with pytest.raises(ConfigError, match="quantize is 'nf4'; make it 'fp8'"):
        FinetuneConfig(compute="fp8", quantize="nf4")


# --- Around a layer. ----------------------------------------------------------------------------


def step(function: Any, layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), [leaf, *trained])]


def adapted(impl: str, dtype: torch.dtype, **options: Any) -> ProdialLinear:
    base = quantize_linear(nn.Linear(160, 72, dtype=dtype), "fp8")
    layer = ProdialLinear.from_linear(base, r=4, compute="fp8", impl=impl, **options)
    randomise_adapters(layer)
    return layer


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_checkpointing_and_compiling_change_nothing(impl: str) -> None:
    dtype = torch.float32 if impl == "torch" else torch.float16
    layer, x = adapted(impl, dtype), torch.randn(2, 6, 160, dtype=dtype)
    expected = step(layer, layer, x)
    again = step(lambda leaf: checkpoint(layer, leaf, use_reentrant=False), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(step(compiled, layer, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_mixers_projection_is_that_of_the_layer(impl: str) -> None:
    """Channel-first output and input, gradients added to another, and what is kept or not."""
    layer = adapted(impl, torch.float16)
    x = torch.randn(2, 8, 160, dtype=torch.float16)
    y, dx, *expected = step(layer, layer, x)
    operands, options = operands_of(layer, x)
    found, h = project(x, operands, options, channel_first=True)
    assert torch.equal(found.mT, y)
    needs = Needs(True, False, True, True, True, True, False)
    dy = (2 * y.detach().float()).half()
    for kept, there in ((Kept(found.mT, h), x.mT.contiguous().mT), (Kept(), x)):
        into = torch.ones(2, 160, 8, dtype=torch.float16)
        gradients = project_backward(
            dy, there, kept, operands, options, needs, channel_first=True, into=into
        )
        assert gradients.x is into
        torch.testing.assert_close(into.mT - 1, dx, rtol=4e-3, atol=4e-3)
        parts = gradients.blocks, gradients.scale, gradients.lora_a, gradients.lora_b
        for ours, theirs in zip(parts, expected, strict=True):
            assert ours is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_under_peft() -> None:
    peft = pytest.importorskip("peft")
    from prodial_kernels.peft import ProdialPeftConfig

    model = build("mamba2")
    quantize_model(model, "fp8")
    wrapped = peft.get_peft_model(model, ProdialPeftConfig(r=4, compute="fp8"))
    assert {layer.compute for layer in adapted_layers(wrapped).values()} == {"fp8"}
    randomise_adapters(wrapped)
    assert training_step(wrapped, token_ids()).logits.isfinite().all()


def test_the_memory_plan_has_neither_a_dense_weight_nor_a_folded_one() -> None:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=4))
    shape = describe_model(model, kernels=True)
    job = Job(1, 1, quantize="fp8")
    levels = ("keep",) * len(shape.layers)
    stored_only, in_fp8 = (
        peak_of(shape, each, levels, evaluation_batch=1, library_workspace=0)
        for each in (job, replace(job, compute="fp8"))
    )
    assert in_fp8.total < stored_only.total
