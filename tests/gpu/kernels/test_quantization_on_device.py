"""Quantised layers on a GPU: the CPU's bytes, gradients, memory, streams, CUDA graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.training.random_weights import RandomWeights
from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial, quantize_model
from prodial_kernels.quantization import (
    FORMATS,
    load_quantized,
    quantize_linear,
)
from prodial_kernels.testing import assert_case_accurate, make_case
from support.captured.on_device import captured, microseconds
from support.models import randomise_adapters
from support.quantized_layers import runner

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_are_those_of_the_cpu(format: str, dtype: torch.dtype) -> None:
    for shape in ((768, 3072), (333, 257)):
        linear = nn.Linear(shape[1], shape[0], dtype=dtype)
        here = quantize_linear(linear, format)
        there = quantize_linear(linear.cuda(), format)
        for name, tensor in here.state_dict().items():
            found = there.state_dict()[name].cpu()
            if "nested_absmax" in name or "quant_state" in name:
                # The mean of the scales is summed in another order.
                continue
            differing = (found.flatten().float() != tensor.flatten().float()).double().mean()
            assert differing <= (0.01 if name == "weight.absmax" else 1e-5), name
        moved = here.cuda()
        assert torch.equal(moved.dequantize().cpu(), here.cpu().dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(format: str, dtype: torch.dtype) -> None:
    layer = quantize_linear(nn.Linear(768, 1536, device="cuda", dtype=dtype), format)
    case = make_case((2, 300), 768, 1536, block_size=24, r=16, device="cuda")
    case = replace(case, weight=layer.dequantize().double())
    assert_case_accurate(case, runner(layer, impl="triton"), compute=dtype)


def dequantising_and_copying(format: str, shape: tuple[int, int]) -> tuple[float, float, int]:
    """Microseconds of the kernel, and of a copy that moves as many bytes; these bytes."""
    linear = nn.Linear(shape[1], shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer = quantize_linear(linear, format)
    out = torch.empty_like(linear.weight)
    layer.dequantize(out)
    moved = out.nbytes + layer.packed_bytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return (
        microseconds(lambda: layer.dequantize(out)),
        microseconds(lambda: target.copy_(source)),
        moved,
    )


@pytest.mark.alone
@pytest.mark.parametrize("format", FORMATS)
def test_dequantising_runs_at_the_speed_of_memory(format: str) -> None:
    """With room above what was measured."""
    kernel, copy, _ = dequantising_and_copying(format, (16384, 4096))
    assert kernel < 2.5 * copy, f"{kernel:.0f} µs, a copy of the same bytes {copy:.0f} µs"


def stack(format: str, depth: int, width: int = 2048) -> nn.Sequential:
    layers = [
        quantize_linear(
            nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16), format
        )
        for _ in range(depth)
    ]
    return nn.Sequential(*(ProdialLinear.from_linear(layer, r=16) for layer in layers))


def mixer_step(mixer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    trained = [p for p in mixer.parameters() if p.requires_grad]
    y = mixer(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *trained])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
@pytest.mark.parametrize("format", FORMATS)
def test_mixers_on_upstreams_kernels(format: str, name: str) -> None:
    """The fused path on quantised projectors is the one on the dense layers they stand for."""
    from support.mamba_ssm_loaded import mamba_ssm

    targets = ["in_proj", "out_proj", *(["x_proj", "dt_proj"] if name == "Mamba" else [])]
    torch.manual_seed(0)
    model = nn.Sequential(getattr(mamba_ssm, name)(256, device="cuda", dtype=torch.bfloat16))
    quantize_model(model, format, target_modules=targets)
    dense = copy.deepcopy(model)
    for target in targets:
        setattr(dense[0], target, getattr(dense[0], target).to_linear())
    for each in (model, dense):
        apply_prodial(each, ProdialConfig(r=8))
        randomise_adapters(each)
    x = torch.randn(2, 512, 256, device="cuda", dtype=torch.bfloat16)
    for ours, theirs in zip(mixer_step(model, x), mixer_step(dense, x), strict=True):
        # Upstream's backward adds some gradients up in an order that differs from run to run.
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 1e-2


def test_random_models_take_no_more_than_they_keep() -> None:
    """A model of 300 MB in bf16 that is quantised while it is drawn, a weight at a time."""
    with torch.device("meta"):
        layers = [nn.ModuleDict({"in_proj": nn.Linear(4096, 4096)}) for _ in range(9)]
        model = nn.Sequential(*layers).bfloat16()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = RandomWeights(model, device="cuda")
    load_quantized(model, weights, "nf4", device="cuda", target_modules=["in_proj"])
    kept = torch.cuda.memory_allocated() - before
    assert kept < 9 * 4096 * 4096 * 0.53
    # bf16, the finished codes, fp32 pieces and their indices, and the comparison's fp32 copies.
    assert torch.cuda.max_memory_allocated() - before - kept < 5 * 4 * 4096 * 4096


@pytest.mark.parametrize("format", FORMATS)
def test_depth_costs_no_dense_weight(format: str) -> None:
    """Peak over what is kept: the temporaries of one layer, whether there are 2 layers or 8."""
    excess = []
    for depth in (2, 8):
        model = stack(format, depth)
        x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        model(x).sum().backward()  # gradients exist from here on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = model(x)
        kept = torch.cuda.memory_allocated() - before
        y.sum().backward()
        excess.append(torch.cuda.max_memory_allocated() - before - kept)
        dense = 2 * 2048 * 2048
        # X, Y and H of 64 tokens in every layer.
        assert kept < depth * dense / 4
        del model, x, y
    assert excess[1] <= excess[0] + 2 * 2048 * 2048 / 2


@pytest.mark.parametrize("format", FORMATS)
def test_graph_capture_and_streams(format: str) -> None:
    model = stack(format, 3, 512)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[Any, ...]:
        y = model(x)
        gradients = torch.autograd.grad(y.float().square().sum(), parameters)
        # A graph kept from the default stream would tie its leaves to it during the capture.
        return y.detach(), *gradients

    expected = [tensor.clone() for tensor in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            beside = step()
    # While the side stream works, the same layers on this one: each has its own temporary.
    for _ in range(3):
        here = step()
    torch.cuda.synchronize()
    for found in (beside, here):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    replay, results = captured(step, warm_ups=0)
    x.copy_(torch.randn_like(x))
    replay()
    fresh = step()
    assert all(torch.equal(a, b) for a, b in zip(results, fresh, strict=True))


if __name__ == "__main__":
    for name in FORMATS:
        for size in ((3072, 768), (8192, 2048), (2048, 4096), (16384, 4096)):
            kernel, copy, moved = dequantising_and_copying(name, size)
            print(
                f"{name} {size[0]}x{size[1]}: {kernel:.1f} µs, {moved / kernel / 1e3:.0f} GB/s; "
                f"a copy of as many bytes {copy:.1f} µs, {moved / copy / 1e3:.0f} GB/s"
            )
