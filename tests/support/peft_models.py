"""Tiny models under PEFT, with adapters that are not at rest."""

from __future__ import annotations

from typing import Any

import peft
import torch
from packaging.version import Version
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from prodial_kernels.peft import ProdialPeftConfig, ProdialPeftLinear
from support.models import build

MIXES_METHODS = hasattr(BaseTuner, "_get_adapter_state_dict")
"""Whether this PEFT saves the tensors of two methods: since 0.21."""

LOADS_INTO_TRANSFORMERS = Version(peft.__version__) >= Version("0.20")
"""Whether transformers' own ``load_adapter`` finds an adapter's tensors with this PEFT."""

BLOCKS = {"in_proj": 4, "out_proj": 2}


def config(**options: Any) -> ProdialPeftConfig:
    """A small adapter with every part."""
    return ProdialPeftConfig(**{"r": 2, "n_blocks": dict(BLOCKS), **options})


def adapted(name: str = "mamba2", adapter: str = "default", **options: Any) -> Any:
    """A tiny model of a family under PEFT, its adapter at values drawn from the name's length."""
    model = get_peft_model(build(name), config(**options), adapter)
    move(model, adapter)
    return model


@torch.no_grad()
def move(model: nn.Module, adapter: str, seed: int = 2) -> None:
    """Move every part of an adapter away from its initial values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for attribute in layer.adapter_layer_names:
            if adapter in layer.factors(attribute):
                weight = layer.factors(attribute)[adapter].weight
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)


def layers(model: nn.Module) -> list[ProdialPeftLinear]:
    return [module for module in model.modules() if isinstance(module, ProdialPeftLinear)]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    training = model.training
    with torch.no_grad():
        out = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(training)
    return out
