"""Adapted models of a few blocks, to be captured."""

from __future__ import annotations

from typing import Any

from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial
from support.models import build, randomise_adapters

LAYERS = 4


def adapted(family: str = "mamba2", *, dropout: float = 0.0, **overrides: Any) -> nn.Module:
    if family in ("mamba", "mamba2", "falcon_mamba", "falcon_h1"):
        overrides.setdefault("num_hidden_layers", LAYERS)
    model = build(family, **overrides)
    apply_prodial(model, ProdialConfig(r=2, lora_dropout=dropout))
    randomise_adapters(model)
    return model
