"""mamba_ssm's mixers, adapted, on the real kernels of mamba-ssm and causal-conv1d.

The exact values are those of the CPU stand-ins in fp64, which know nothing of upstream's kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from prodial_kernels import ProdialConfig, ProdialLinear, remove_prodial
from prodial_kernels.testing import assert_all_accurate
from support.mamba_ssm_loaded import CONFIG, MARKS, WIDTH, adapt
from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.adapted_families import EffectiveWeight

pytestmark = MARKS

EVERY = ProdialConfig(r=4, target_modules=("in_proj", "out_proj", "x_proj", "dt_proj"))
MIXERS = ("Mamba", "Mamba2", "Mamba2Simple")


def mixer_class(name: str) -> type[nn.Module]:
    import mamba_ssm
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    return Mamba2Simple if name == "Mamba2Simple" else getattr(mamba_ssm, name)


def block(name: str, config: ProdialConfig = CONFIG, **options: Any) -> nn.Module:
    """One adapted mixer in bf16, inside a module that can be adapted."""
    torch.manual_seed(0)
    parent = nn.Module()
    if name.startswith("Mamba2"):
        # Upstream's unfused convolution wants rows of in_proj's output to be multiples of 8.
        options = {"headdim": 64, **options}
    parent.mixer = mixer_class(name)(WIDTH, device="cuda", dtype=torch.bfloat16, **options)
    return adapt(parent, config)


def exact_step(parent: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """In fp64: plain linears with W' as parametrisation, the stand-in's sequential scan."""
    twin = copy.deepcopy(parent)
    layers = {n: m for n, m in twin.named_modules() if isinstance(m, ProdialLinear)}
    remove_prodial(twin)
    twin.double().requires_grad_(False)
    for path, layer in layers.items():
        parametrize.register_parametrization(
            twin.get_submodule(path), "weight", EffectiveWeight(layer).double()
        )
    mixer = twin.mixer
    name = type(mixer).__name__
    mixer.use_fast_path = mixer.use_mem_eff_path = False
    if name != "Mamba":
        norm = stand_ins._GatedNorm(mixer.norm.weight.numel(), torch.float64)
        norm.weight = mixer.norm.weight
        mixer.norm = norm
        mixer.rmsnorm = True
    forward = getattr(stand_ins, name).forward
    return run(twin, lambda value: forward(mixer, value), x.double(), grad.double())


def run(parent: nn.Module, function: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of x and of everything that trains; none is missing or zero."""
    x = x.detach().clone().requires_grad_()
    trained = {n: p for n, p in parent.named_parameters() if p.requires_grad}
    y = function(x)
    gradients = torch.autograd.grad(y, [x, *trained.values()], grad)
    for name, gradient in zip(("x", *trained), gradients, strict=True):
        assert torch.isfinite(gradient).all(), f"{name} has a non-finite gradient"
        assert gradient.count_nonzero() > 0, f"{name} has a zero gradient"
    names = [name.replace("parametrizations.weight.0.", "") for name in trained]
    named = dict(zip(names, gradients[1:], strict=True))
    return {"y": y.detach(), "x": gradients[0], **named}


def eager_step(parent: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """In bf16 on upstream's unfused path, the projectors in plain PyTorch."""
    twin = copy.deepcopy(parent)
    for layer in (m for m in twin.modules() if isinstance(m, ProdialLinear)):
        layer.impl = "reference"
    twin.mixer.use_fast_path = twin.mixer.use_mem_eff_path = False
    return run(twin, twin.mixer, x, grad)


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (batch, length, WIDTH)
    x, grad = torch.randn(2, *shape, device="cuda", generator=generator).bfloat16()
    return x, grad


@pytest.mark.parametrize("shape", [(2, 129), (1, 1), (3, 64)], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_step_equals_parametrized_linears(name: str, shape: tuple[int, int]) -> None:
    parent, (x, grad) = block(name), inputs(*shape)
    got = run(parent, parent.mixer, x, grad)
    exact = exact_step(parent, x, grad)
    assert_all_accurate(got, eager_step(parent, x, grad), exact, torch.bfloat16)


def test_longer_than_one_chunk_of_the_scan() -> None:
    """Above 2048 steps the scan keeps states for its backward; checked against upstream's own."""
    parent, (x, grad) = block("Mamba"), inputs(2, 2100)
    got, eager = run(parent, parent.mixer, x, grad), eager_step(parent, x, grad)
    for name, value in got.items():
        error = (value.double() - eager[name].double()).norm() / eager[name].double().norm()
        assert error < 0.03, f"{name}: {error:.3f}"


@pytest.mark.parametrize("recompute", [False, True])
def test_x_proj_dt_proj_and_partial_tuning(recompute: bool) -> None:
    parent, (x, grad) = block("Mamba", EVERY), inputs(2, 65)
    exact = exact_step(parent, x, grad)
    eager = eager_step(parent, x, grad)
    parent.mixer.prodial_recompute_xz = recompute
    assert_all_accurate(run(parent, parent.mixer, x, grad), eager, exact, torch.bfloat16)
    for name, parameter in parent.mixer.named_parameters():
        if name in ("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.base_layer.bias"):
            parameter.requires_grad_()
    got = run(parent, parent.mixer, x, grad)
    eager = eager_step(parent, x, grad)
    for name in got.keys() - exact.keys():
        error = (got[name].double() - eager[name].double()).norm() / eager[name].double().norm()
        assert error < 0.03, f"{name}: {error:.3f}"


@pytest.mark.parametrize("name", MIXERS)
def test_every_tensor_may_be_the_only_one_that_trains(name: str) -> None:
    parent, (x, grad) = block(name), inputs(2, 33)
    full = run(parent, parent.mixer, x, grad)
    trained = {n: p for n, p in parent.named_parameters() if p.requires_grad}
    for chosen, parameter in trained.items():
        parent.requires_grad_(False)
        parameter.requires_grad_()
        (alone,) = torch.autograd.grad(parent.mixer(x), parameter, grad)
        # Of the gradient's size: the rank-r product H is kept or made again, from the scan's
        # output before or after it was rounded.
        error = (alone - full[chosen]).abs().max() / full[chosen].abs().max()
        assert error < 0.02, f"{chosen}: {error:.3f}"


@pytest.mark.parametrize("name", MIXERS)
def test_dropout_trains_and_checkpointing_repeats_it(name: str) -> None:
    parent = block(name, ProdialConfig(r=16, lora_dropout=0.3))
    x, grad = inputs(2, 65)
    without = block(name, ProdialConfig(r=16)).mixer(x)
    results = []
    for wrap in (False, True):
        torch.manual_seed(5)

        def forward(value: Tensor, wrap: bool = wrap) -> Tensor:
            mixer = parent.mixer
            return checkpoint(mixer, value, use_reentrant=False) if wrap else mixer(value)

        results.append(run(parent, forward, x, grad))
    assert torch.equal(results[0]["y"], results[1]["y"])
    for key, value in results[0].items():
        # Upstream's scan backward adds with atomics: two runs differ in the last places.
        other = results[1][key]
        assert (value - other).norm() < 1e-2 * value.norm(), key
    assert not torch.equal(results[0]["y"], without)


def test_mamba2_packed_sequences_equal_separate_ones() -> None:
    parent = block("Mamba2")
    x, _ = inputs(1, 96)
    seq_idx = (torch.arange(96, device="cuda")[None] >= 40).int()
    packed = parent.mixer(x, seq_idx=seq_idx)
    apart = torch.cat([parent.mixer(x[:, :40]), parent.mixer(x[:, 40:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=2e-2, atol=2e-2)
    flat = parent.mixer(x.flatten(0, 1), seqlen=96)
    torch.testing.assert_close(flat, parent.mixer(x).flatten(0, 1))


def test_mamba2_with_a_gated_mlp_inside() -> None:
    parent, (x, grad) = block("Mamba2", d_ssm=WIDTH, headdim=32), inputs(2, 33)
    got = run(parent, parent.mixer, x, grad)
    exact, eager = exact_step(parent, x, grad), eager_step(parent, x, grad)
    assert_all_accurate(got, eager, exact, torch.bfloat16)


@pytest.mark.slow  # upstream tunes Mamba-3's kernels for five minutes
def test_mamba3_calls_its_projectors() -> None:
    parent, (x, grad) = block("Mamba3"), inputs(2, 64)
    # The first step is the tuning's: it runs every candidate on the live buffers.
    run(parent, parent.mixer, x, grad)
    got = run(parent, parent.mixer, x, grad)
    twin = copy.deepcopy(parent)
    layers = {n: m for n, m in twin.named_modules() if isinstance(m, ProdialLinear)}
    remove_prodial(twin)
    twin.requires_grad_(False)
    for path, layer in layers.items():
        module = EffectiveWeight(layer)
        parametrize.register_parametrization(twin.get_submodule(path), "weight", module)
    expected = run(twin, twin.mixer, x, grad)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 0.05, f"{name}: {error:.3f}"
