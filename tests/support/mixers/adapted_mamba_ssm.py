"""mamba_ssm's mixers, adapted, and the same step computed with plain linear layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial, remove_prodial
from prodial_kernels.testing import assert_all_accurate
from support.mixers.adapted_families import EffectiveWeight
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2, Mamba2Simple, Model
from support.models import randomise_adapters

# A, D and the bias of delta, of both directions where there are two.
MASTERS = ("A_log", "mixer.D", "dt_bias", "A_b_log", "D_b")
MIXERS = (Mamba, Mamba2, Mamba2Simple)
BLOCKS = {"in_proj": 4, "out_proj": 2}
CONFIG = ProdialConfig(r=3, lora_alpha=6, block_size=BLOCKS)
EVERY = ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "x_proj", "dt_proj"))


def adapted(mixer: type[nn.Module], config: ProdialConfig = CONFIG, **options: Any) -> Model:
    """In fp64, where a mistake is not hidden by rounding."""
    model = Model(mixer, **options).double()
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast in place; A, D and the bias of delta stay in fp32 beside 16 bits."""
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(MASTERS) and dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    return model


def oracle(adapted_model: Model) -> Model:
    """In fp64 on plain linears, the fast path off, W' as a parametrisation."""
    model = copy.deepcopy(adapted_model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ProdialLinear)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    remove_prodial(model)
    model.double()
    for path, layer in layers.items():
        module = EffectiveWeight(layer).double()
        parametrize.register_parametrization(model.get_submodule(path), "weight", module)
    fast_path_off(model)
    for name, parameter in model.named_parameters():
        own = name.replace("parametrizations.weight.0.", "").replace(
            "parametrizations.weight.original", "base_layer.weight"
        )
        parent, _, last = own.rpartition(".")
        wrapped = f"{parent}.base_layer.{last}"
        parameter.requires_grad_(own in trained or wrapped in trained)
    return model


def fast_path_off(model: Model) -> Model:
    for layer in model.layers:
        layer.mixer.use_fast_path = layer.mixer.use_mem_eff_path = False
    return model


def eager(adapted_model: Model) -> Model:
    """The same adapters in plain PyTorch in the same dtypes, the fast path off."""
    model = fast_path_off(copy.deepcopy(adapted_model))
    for layer in (m for m in model.modules() if isinstance(m, ProdialLinear)):
        layer.impl = "reference"
    return model


def step(model: nn.Module, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Logits and every gradient asked for, the embedded input's among them."""
    model.embedding.weight.requires_grad_()
    model.zero_grad()
    logits = model(ids, **kwargs)
    grad = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    logits.backward(grad.to(logits.dtype))
    named = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.count_nonzero() > 0, f"{name} has a zero gradient"
            own = name.replace("parametrizations.weight.0.", "").replace("base_layer.", "")
            named[own] = parameter.grad.clone()
    return named


def assert_right(model: Model, ids: Tensor, **kwargs: Any) -> None:
    """Logits and gradients as the oracle's: equal in fp64, else by the accuracy rule."""
    dtype = model.embedding.weight.dtype
    exact = step(oracle(model), ids, **kwargs)
    got = step(model, ids, **kwargs)
    if dtype != torch.float64:
        assert_all_accurate(got, step(eager(model), ids, **kwargs), exact, dtype)
        return
    assert got.keys() == exact.keys()
    for name, value in got.items():
        # A, D and the bias of delta go through fp32 here and upstream.
        error = (value - exact[name]).norm() / exact[name].norm()
        assert error < 1e-6, f"{name}: relative error {error:.1e}"


def token_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(1))
