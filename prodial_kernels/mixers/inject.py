"""Put adapters into a model, merge them, take them out again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from prodial_kernels._validation import check_choice
from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import ProdialLinear, weight_like
from prodial_kernels.mixers.families import adapt_mixers, check_mixers
from prodial_kernels.mixers.report import AdapterReport, adapter_report
from prodial_kernels.mixers.seam import Undo
from prodial_kernels.mixers.targets import Target, find_saved, find_targets, module_paths
from prodial_kernels.quantization import (
    FORMATS,
    QuantizationError,
    QuantizationReport,
    QuantizedLinear,
)
from prodial_kernels.quantization.saving import (
    release_saving,
    settle_configuration,
    watch_saving,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

_STATE = "_prodial_state"


@dataclass
class _State:
    """What undoing needs, kept on the model: the one attribute that ``apply_prodial`` adds."""

    config: ProdialConfig
    requires_grad: dict[str, bool]
    handles: list[Undo] = field(default_factory=list)


def apply_prodial(model: nn.Module, config: ProdialConfig) -> AdapterReport:
    """Replace the targets of ``config`` by adapted layers, in place, and freeze the rest.

    The adapted model computes what it computed before until the adapter is trained. Everything
    is checked before the first change; on an error the model is as it was. A layer that the model
    holds at several places becomes one adapted layer at all of them. Train and eval mode, devices
    and dtypes stay; adapters are fp32 (fp64 in an fp64 model).

    Args:
        model: Any module. It keeps its class and its own methods.
        config: What to adapt and how.

    Returns:
        What is trained now; prints as a table.

    Raises:
        TypeError: ``config`` is not a ``ProdialConfig``.
        ValueError: The configuration does not fit the model: nothing matches, a name matches
            nothing, a match is not a plain ``nn.Linear``, a target matches in only some of the
            layers (see ``allow_partial``), a block count does not divide ``in_features``,
            ``modules_to_save`` matches nothing, a mixer would bypass its adapter, or the model is
            already adapted.
    """
    if not isinstance(config, ProdialConfig):
        raise TypeError(f"config must be a ProdialConfig, got {type(config).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model is itself an nn.Linear, which has no parent to be replaced in; use "
            "ProdialLinear.from_linear(model, ...)"
        )
    if hasattr(model, _STATE) or _adapted_paths(model):
        raise ValueError(
            "the model is already adapted; call remove_prodial(model) or merge_prodial(model) first"
        )
    targets = find_targets(model, config)
    saved = find_saved(model, config, targets)
    check_mixers(model, targets)

    named = list(model.named_parameters(remove_duplicate=False))
    state = _State(config, {name: parameter.requires_grad for name, parameter in named})
    try:
        layers = [_adapted_layer(target, config) for target in targets]
    except BaseException:
        _restore_requires_grad(model, state)
        raise
    model.requires_grad_(False)
    for module in saved:
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    for target, layer in zip(targets, layers, strict=True):
        _place(model, target.paths, layer)
    state.handles = adapt_mixers(model)
    setattr(model, _STATE, state)
    watch_saving(model)
    return adapter_report(model)


def merge_prodial(model: ModelT) -> ModelT:
    """Turn an adapted model into a plain one with the adapted weights, in place.

    Each adapted layer becomes an ``nn.Linear`` with weight W', dense on a quantised base too;
    layers are replaced one at a time, so memory grows by one layer only (on a quantised base, by
    what the dense weights take more). Quantised layers without an adapter become dense too, so
    that the model can be saved as any other. ``requires_grad`` is as it was before
    ``apply_prodial``. A weight that was tied to another one is no longer tied, and
    ``model.config`` says so; nor does it let transformers rescale weights when they are loaded.

    Returns:
        ``model``.

    Raises:
        ValueError: ``apply_prodial`` was not called on this model.
    """
    state = _get_state(model)
    for paths in _adapted_paths(model):
        # No name may hold on to the old layer, or all of them would live until the end.
        _place(model, paths, _adapted_at(model, paths).to_linear())
    for paths in _quantized_paths(model):
        _place(model, paths, _quantized_at(model, paths).to_linear())
    settle_configuration(model)
    return _detach(model, state)


def merge_quantized(model: nn.Module, format: str) -> QuantizationReport:
    """Merge as :func:`merge_prodial` does, into layers stored in ``format``, in place.

    One dense weight exists at a time. W' lies between the values that a format has, even where W
    was one of them, so this loses part of what was trained: compare before it is used.

    Args:
        model: An adapted model, on a dense or a quantised base.
        format: ``"nf4"``, ``"int8"`` or ``"fp8"``.

    Returns:
        What quantising each W' lost.

    Raises:
        ValueError: ``apply_prodial`` was not called on this model, or an unknown format.
    """
    check_choice("format", format, FORMATS)
    state = _get_state(model)
    errors: dict[str, QuantizationError] = {}
    before = after = 0
    for paths in _adapted_paths(model):
        layer, error = _adapted_at(model, paths).to_quantized(format)
        _place(model, paths, layer)
        errors[paths[0]] = error
        before += layer.in_features * layer.out_features * layer.dtype.itemsize
        after += layer.packed_bytes
    _detach(model, state)
    return QuantizationReport(format, errors, before, after)


def remove_prodial(model: ModelT) -> ModelT:
    """Take the adapters out: the very layers that were there before are put back, in place.

    ``requires_grad`` is as it was before ``apply_prodial``. Modules of ``modules_to_save`` keep
    the values they were trained to.

    Returns:
        ``model``.

    Raises:
        ValueError: ``apply_prodial`` was not called on this model.
    """
    state = _get_state(model)
    for paths in _adapted_paths(model):
        _place(model, paths, _adapted_at(model, paths).base_layer)
    return _detach(model, state)


def get_prodial_config(model: nn.Module) -> ProdialConfig:
    """Return the configuration that ``apply_prodial`` was given.

    Raises:
        ValueError: ``apply_prodial`` was not called on this model.
    """
    return _get_state(model).config


def _get_state(model: nn.Module) -> _State:
    state = getattr(model, _STATE, None)
    if not isinstance(state, _State):
        raise ValueError(
            f"this {type(model).__name__} has no ProDiaL adapter; pass the very module that "
            "apply_prodial was called on, not a wrapper or a part of it"
        )
    return state


def _adapted_layer(target: Target, config: ProdialConfig) -> ProdialLinear:
    linear = target.linear
    layer = ProdialLinear.from_linear(
        linear,
        r=config.r,
        lora_alpha=config.r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        diagonal=config.diagonal,
        train_scale=config.train_scale,
        train_diagonal=config.train_diagonal,
        adapter_dtype=torch.promote_types(torch.float32, weight_like(linear).dtype),
        impl=config.impl,
        **config.blocks_of(target.name),
    )
    return layer.train(linear.training)


def _adapted_paths(model: nn.Module) -> list[tuple[str, ...]]:
    paths = module_paths(model)
    return [names for module, names in paths.items() if isinstance(module, ProdialLinear)]


def _adapted_at(model: nn.Module, paths: tuple[str, ...]) -> ProdialLinear:
    layer = model.get_submodule(paths[0])
    if not isinstance(layer, ProdialLinear):
        raise RuntimeError(f"{paths[0]} changed from a ProdialLinear while it was being replaced")
    return layer


def _quantized_paths(model: nn.Module) -> list[tuple[str, ...]]:
    paths = module_paths(model)
    return [names for module, names in paths.items() if isinstance(module, QuantizedLinear)]


def _quantized_at(model: nn.Module, paths: tuple[str, ...]) -> QuantizedLinear:
    layer = model.get_submodule(paths[0])
    if not isinstance(layer, QuantizedLinear):
        raise RuntimeError(f"{paths[0]} changed while it was being made dense")
    return layer


def _place(model: nn.Module, paths: tuple[str, ...], module: nn.Module) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _detach(model: ModelT, state: _State) -> ModelT:
    for handle in state.handles:
        handle.remove()
    delattr(model, _STATE)
    release_saving(model)
    _restore_requires_grad(model, state)
    return model


def _restore_requires_grad(model: nn.Module, state: _State) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])
