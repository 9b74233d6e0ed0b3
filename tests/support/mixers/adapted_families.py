"""Adapted tiny models of every family, and the same step computed with plain linear layers."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from prodial_kernels.models.mixers.hf import FUSED_SSD, fused_function
from support.mixers import mamba_ssm_stand_ins, stand_ins
from support.models import FAMILIES, Step, build, randomise_adapters, training_step

CONFIG = ProdialConfig(r=3, lora_alpha=6, block_size={"in_proj": 4, "out_proj": 2})


class EffectiveWeight(nn.Module):
    """Eq. 7 written out densely, independent of the package: W -> s ⊙ (W D_b) + α B A."""

    def __init__(self, layer: ProdialLinear) -> None:
        super().__init__()
        for name, parameter in layer.adapter_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))
        self.lora_scaling = layer.lora_alpha / layer.r
        self.diagonal = layer.diagonal

    def forward(self, weight: Tensor) -> Tensor:
        d_a = torch.block_diag(*self.prodial_blocks)
        identity = torch.eye(d_a.shape[0], device=d_a.device)
        if self.diagonal == "free":
            d_b = identity + d_a
        else:
            d_b = (identity - torch.relu(identity * d_a)) + (1 - identity) * d_a
        low_rank = self.lora_scaling * (self.prodial_b @ self.prodial_a)
        effective = (1 + self.prodial_scale)[:, None] * (weight.to(d_b.dtype) @ d_b) + low_rank
        return effective.to(weight.dtype)


def adapt(name: str, config: ProdialConfig = CONFIG, **overrides: object) -> nn.Module:
    model = build(name, **overrides)
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


def oracle_step(name: str, adapted: nn.Module, ids: Tensor, **overrides: object) -> Step:
    """The same step on plain nn.Linear layers, their weights computed by ``EffectiveWeight``."""
    model = build(name, **overrides).requires_grad_(False)
    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, ProdialLinear)}
    for path, layer in layers.items():
        parametrize.register_parametrization(
            model.get_submodule(path), "weight", EffectiveWeight(layer)
        )
    step = training_step(model, ids)
    renamed = {n.replace("parametrizations.weight.0.", ""): g for n, g in step.gradients.items()}
    return Step(step.logits, renamed)


def assert_alive_and_equal(step: Step, expected: Step) -> None:
    """Every adapter tensor has a finite non-zero gradient, and it is the expected one."""
    assert step.gradients.keys() == expected.gradients.keys()
    for name, gradient in step.gradients.items():
        assert gradient is not None, f"{name} has no gradient"
        assert torch.isfinite(gradient).all(), f"{name} has a non-finite gradient"
        assert gradient.count_nonzero() > 0, f"{name} has a zero gradient"
        reference = expected.gradients[name]
        error = (gradient - reference).norm() / reference.norm()
        assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"
    torch.testing.assert_close(step.logits, expected.logits, rtol=1e-4, atol=1e-5)


def count_projectors(model: nn.Module) -> int:
    return sum(isinstance(module, ProdialLinear) for module in model.modules())


def fused_mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if fused_function(module)]


def install_stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Put the stand-in into a family's modeling module; return the widths it will produce."""
    family = FAMILIES[name]
    stand_in = getattr(stand_ins, family.fused)
    modeling = sys.modules[type(build(name)).__module__]
    widths: list[int] = []

    def recorded(*args: object, **kwargs: object) -> Tensor:
        output = stand_in(*args, **kwargs)
        widths.append(output.shape[-1])
        return output

    assert hasattr(modeling, family.fused)
    monkeypatch.setattr(modeling, family.fused, recorded)
    return widths


def install_mamba_ssm(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let a family's modeling module call a stand-in for mamba-ssm; return its calls to be."""
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

    modeling = sys.modules[type(build(name)).__module__]
    package = ModuleType("mamba_ssm")
    package.mamba_split_conv1d_scan_combined = mamba_ssm_stand_ins.mamba_split_conv1d_scan_combined
    original = getattr(modeling, FUSED_SSD).__wrapped__
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mamba_ssm", package)
        decorate = use_kernel_func_from_hub_with_fallback(
            "mamba_split_conv1d_scan_combined", "mamba_ssm"
        )
        decorated = decorate(original)
    monkeypatch.setattr(modeling, FUSED_SSD, decorated)
    mamba_ssm_stand_ins.fused_calls.clear()
    return mamba_ssm_stand_ins.fused_calls


def forbid_reading_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(layer: ProdialLinear) -> Tensor:
        raise AssertionError("ProdialLinear.weight was read")

    monkeypatch.setattr(ProdialLinear, "weight", property(read))
