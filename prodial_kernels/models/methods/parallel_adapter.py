"""ParallelAdapter: a small network beside a mixer's output projection."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.linear import weight_like
from prodial_kernels.methods import ParallelAdapter
from prodial_kernels.models.methods.base import Addition, Site, zeros_beside
from prodial_kernels.models.methods.mixer_parts import mixers_of
from prodial_kernels.models.mixers.branch import DOWN, OPTIONS, UP, branch_of


class Branch(Addition):
    """The network beside one output projection; it stays a module's part when a model is merged."""

    def __init__(self, layer: nn.Module, method: ParallelAdapter) -> None:
        """Put it beside ``layer``."""
        projector: Any = layer
        like = weight_like(getattr(projector, "base_layer", projector))
        a = zeros_beside(like, method.r, projector.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        tensors = {DOWN: a, UP: zeros_beside(like, projector.out_features, method.r)}
        super().__init__(layer, method, tensors, policies={"forward": call_with_branch})
        vars(layer)[OPTIONS] = method

    def remove(self) -> None:
        """Take it away."""
        super().remove()
        vars(self.module).pop(OPTIONS, None)


def parallel_adapter_sites(model: nn.Module, method: ParallelAdapter) -> list[Site]:
    """Plan the networks; ValueError where no mixer has an ``out_proj``."""
    sites = []
    for path, mixer in mixers_of(model):
        layer: Any = mixer._modules.get("out_proj")
        if layer is not None:
            where = f"{path}.out_proj" if path else "out_proj"
            shapes = {DOWN: (method.r, layer.in_features), UP: (layer.out_features, method.r)}
            sites.append(Site(where, shapes, partial(_install, model, where, method)))
    if not sites:
        raise ValueError("parallel-adapter: no mixer of this model has an out_proj")
    return sites


def _install(model: nn.Module, path: str, method: ParallelAdapter) -> Branch:
    return Branch(model.get_submodule(path), method)


def call_with_branch(layer: Any, upstream: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of a projection with a network beside it."""
    y: Tensor = upstream(layer, input, *args, **kwargs)
    found = branch_of(layer)
    if found is None:
        return y
    a, b, method = found
    hidden = F.relu(F.linear(input, a.to(input.dtype)))
    hidden = F.dropout(hidden, method.dropout, layer.training)
    return y + F.linear(hidden, b.to(hidden.dtype) * method.scale).to(y.dtype)
