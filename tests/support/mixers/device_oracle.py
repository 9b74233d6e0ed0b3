"""What an adapted model of transformers is held to on a device: plain layers, exact and not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import ProdialLinear
from prodial_kernels.models.mixers.hf import fused_function, unfused_forward
from prodial_kernels.models.patch_point import AdaptedMixer
from support.mixers.adapted_families import EffectiveWeight
from support.models import Step


def modeling_of(model: nn.Module) -> ModuleType:
    return sys.modules[type(model).__module__]


@contextmanager
def pytorch_functions(modeling: ModuleType) -> Iterator[None]:
    """Run the functions that transformers falls back to, without TF32."""
    originals = {n: f for n, f in vars(modeling).items() if hasattr(f, "__wrapped__")}
    vars(modeling).update({n: f.__wrapped__ for n, f in originals.items()})
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        vars(modeling).update(originals)


def with_effective_weights(reference: nn.Module, model: nn.Module, device: str) -> nn.Module:
    """Give a plain model the weights W' of an adapted one, by its adapters' parameters."""
    for path, layer in model.named_modules():
        if isinstance(layer, ProdialLinear):
            effective = EffectiveWeight(layer).to(device)
            parametrize.register_parametrization(reference.get_submodule(path), "weight", effective)
    return reference


def without_fused_functions(model: nn.Module) -> nn.Module:
    """Let every mixer run separate kernels."""
    for module in list(model.modules()):
        if fused_function(module):
            AdaptedMixer(module, {"forward": unfused_forward})
    return model


def tensors(step: Step) -> dict[str, Tensor]:
    renamed = {n.replace("parametrizations.weight.0.", ""): g for n, g in step.gradients.items()}
    return {"logits": step.logits, **renamed}


def assert_accurate_in_the_mean(
    result: Mapping[str, Tensor], exact: Mapping[str, Tensor], eager: Mapping[str, Tensor]
) -> None:
    """The accuracy rule in the mean: one element's error is the path of two whole models."""
    assert result.keys() == exact.keys() == eager.keys()
    for key, tensor in result.items():
        assert tensor.count_nonzero() > 0, f"{key} is dead"
        error = (tensor.float() - exact[key].float()).norm()
        allowed = 2 * (eager[key].float() - exact[key].float()).norm()
        allowed += torch.finfo(torch.bfloat16).eps / 2 * exact[key].norm()
        assert error <= allowed, f"{key}: error {error:.2e}, allowed {allowed:.2e}"
