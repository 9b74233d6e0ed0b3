"""What each method trains: ProDiaL, LoRA of the same size, or every parameter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prodial_kernels.checkpoint import load_adapter
from prodial_kernels.config import ProdialConfig, resolve_block_size
from prodial_kernels.models.adapt.inject import apply_prodial
from prodial_kernels.models.adapt.report import AdapterReport, adapter_report
from prodial_kernels.models.adapt.targets import find_targets
from prodial_kernels.models.loading.load import empty_model
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.config import ResolvedConfig
from prodial_kernels.training.start.drawing import DrawnOn
from prodial_kernels.training.step.optimizers import adapter_parameter_groups, make_optimizer


@dataclass(frozen=True)
class PreparedMethod:
    """A model made ready for training.

    Attributes:
        adapter: The adapter's configuration; None for full fine-tuning.
        optimizer: Over the trained parameters.
        report: What is trained.
    """

    adapter: ProdialConfig | None
    optimizer: torch.optim.Optimizer
    report: AdapterReport


def prepare_method(
    model: nn.Module,
    config: ResolvedConfig,
    arrange: Callable[[nn.Module], object] | None = None,
    *,
    drawn_on: torch.device | None = None,
) -> PreparedMethod:
    """Freeze and adapt, or free, the parameters of a model on its device, and make the optimiser.

    ``arrange`` may move them to other places before there is an optimiser. Initial values are drawn
    where the model is, or as on ``drawn_on``.

    Raises:
        AdapterError: The adapter to begin with is not one of this model.
        OptimizerError: The optimiser needs what is not there.
        ValueError: The adapter does not fit the model, or all of it is to be trained and some is
            quantised.
    """
    if config.method == "full":
        _check_dense(model)
        # Sixteen-bit weights would swallow an optimiser's small steps.
        model.float()
    with nullcontext() if drawn_on is None else DrawnOn(drawn_on):
        adapter = make_trainable(model, config)
    if config.init_adapter is not None:
        load_adapter(model, config.init_adapter)
    if arrange is not None:
        arrange(model)
    groups = adapter_parameter_groups(model, weight_decay=config.weight_decay, lr=config.lr)
    device = next(model.parameters()).device
    optimizer = make_optimizer(config.optimizer, groups, lr=config.lr, device=device)
    return PreparedMethod(adapter, optimizer, adapter_report(model))


def trained_on_meta(
    config: ResolvedConfig, dtype: torch.dtype, model: nn.Module | None = None
) -> nn.Module:
    """Build a run's model as it will be trained, on the ``meta`` device: shapes, no weights.

    ``model`` is one that is at hand, and stays as it is; None for the one that is named.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
        ValueError: The adapter does not fit the model.
    """
    dtype = torch.float32 if config.method == "full" else dtype
    if model is None:
        empty: nn.Module = empty_model(config.model, dtype=dtype)
    else:
        empty = on_meta(model).to(dtype)
    make_trainable(empty, config)
    return empty


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model without values: the same modules, all tensors on ``meta``."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(model, memo)


def make_trainable(model: nn.Module, config: ResolvedConfig) -> ProdialConfig | None:
    """Freeze and adapt the model's parameters, or free all of them, in place; return the adapter.

    There is none for full fine-tuning. ValueError where it does not fit the model.
    """
    if config.method == "full":
        model.requires_grad_(True)
        return None
    adapter = adapter_for(model, config)
    apply_prodial(model, adapter)
    return adapter


def adapter_for(model: nn.Module, config: ResolvedConfig) -> ProdialConfig:
    """Return the adapter that a configuration means for a model, its rank matched or checked.

    Raises:
        ValueError: The adapter does not fit the model, or its rank is more than any layer can use.
    """
    if config.r is None and config.methods is None:
        return config.adapter(r=matched_lora_rank(model, config.reference_adapter()))
    adapter = config.adapter()
    check_rank(model, adapter)
    return adapter


def check_rank(model: nn.Module, adapter: ProdialConfig) -> None:
    """Raise ValueError if no adapted layer can have a product B A of the rank that is asked for."""
    sides = {
        min(t.linear.in_features, t.linear.out_features): t.paths[0]
        for t in find_targets(model, adapter)
    }
    most = max(sides, default=adapter.r)
    if adapter.r > most:
        raise ValueError(
            f"r must be at most {most}, the smaller side of {sides[most]}, got {adapter.r}: no "
            "product B A has a larger rank than that, so more would only cost memory"
        )


def _check_dense(model: nn.Module) -> None:
    stored = {
        layer.FORMAT: path
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    for format, path in stored.items():
        raise ValueError(
            f"method 'full' trains dense weights, and this checkpoint holds {path} (and more) in "
            f"{format}, which gets no gradient; use a dense checkpoint, or train an adapter"
        )


def matched_lora_rank(model: nn.Module, reference: ProdialConfig) -> int:
    """Return the rank, at least 1, at which LoRA is closest in size to a ProDiaL adapter.

    In a layer of shape [N, K] a ProDiaL adapter of rank r with blocks of side P has
    ``K·P + N + r (K + N)`` parameters, and LoRA of rank r has ``r (K + N)``.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    prodial = per_rank = 0
    for target in find_targets(model, reference):
        k, n = target.linear.in_features, target.linear.out_features
        per_rank += k + n
        prodial += reference.r * (k + n)
        prodial += n if reference.train_scale else 0
        if reference.train_diagonal:
            prodial += k * resolve_block_size(k, **reference.blocks_of(target.name))
    return max(1, round(prodial / per_rank))
