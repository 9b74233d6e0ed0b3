"""Resolving a configuration to the layers of a model that PEFT may have adapted, or refusing it."""

from __future__ import annotations

from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from prodial_kernels.config import PLACEMENTS, ProdialConfig, resolve_block_size
from prodial_kernels.linear import ProdialLinear
from prodial_kernels.models.adapt.families import check_mixers
from prodial_kernels.models.adapt.targets import (
    Target,
    find_saved,
    refuse_second_names,
    target_of,
)
from prodial_kernels.models.mixers.structure import weight_reads
from prodial_kernels.models.placements import resolve_placements
from prodial_kernels.module_tree import module_paths
from prodial_kernels.peft.config import ProdialPeftConfig
from prodial_kernels.peft.layer import ProdialPeftLinear

# PEFT adds these two by itself for classification, whichever of them the model has.
_HEADS = frozenset(("classifier", "score"))


def find_layers(
    model: nn.Module, config: ProdialPeftConfig, matches: Callable[[str], bool]
) -> dict[nn.Module, Target]:
    """Check the layers that are to be adapted, and return those that have no adapter yet.

    Args:
        model: The model, with its mixers' own classes.
        config: Of the adapter.
        matches: Whether a dotted path is one of the targets.

    Raises:
        ValueError: A layer cannot be adapted, or an option does not fit the layers.
    """
    _check_methods(model)
    new: dict[nn.Module, Target] = {}
    matched: list[str] = []
    for module, paths in _outside_adapters(model).items():
        if not matches(paths[0]):
            continue
        matched.append(paths[0])
        features = module.in_features if isinstance(module, ProdialPeftLinear) else None
        if features is None:
            new[module] = layer = _new_layer(model, module, paths)
            features = layer.linear.in_features
        options = config.for_layer(paths[0])
        try:
            resolve_block_size(features, **options.blocks_of(paths[0]))
        except ValueError as error:
            raise ValueError(f"{paths[0]}: {error}") from error
    unused = config.unused_patterns(matched) if matched else {}
    for option, names in unused.items():
        raise ValueError(
            f"{option} names {names}, which match none of the targets: {', '.join(matched[:8])}"
        )
    targets = list(new.values())
    check_mixers(model, targets)
    refuse_second_names(model, {module: layer.paths[0] for module, layer in new.items()})
    saved = tuple(name for name in config.modules_to_save or () if name not in _HEADS)
    find_saved(model, ProdialConfig(modules_to_save=saved), targets)
    return new


def resolve_targets(model: nn.Module, config: ProdialPeftConfig) -> None:
    """Write names of layers in the place of ``"mixer"``, ``"auto"`` and their like.

    Raises:
        ValueError: The model has no layers of that part.
    """
    names = config.target_modules
    listed = {names} if isinstance(names, str) else {*(names or ())}
    if listed & {*PLACEMENTS}:
        own = ProdialConfig(target_modules=tuple(sorted(listed)))
        config.target_modules = [*resolve_placements(model, own).target_modules]


def check_lora_targets(
    model: nn.Module,
    config: ProdialPeftConfig,
    is_prodial: Callable[[str], bool],
    is_lora: Callable[[str], bool],
) -> None:
    """Refuse, before anything changes, layers on which PEFT's LoRA would fail or be ambiguous.

    Raises:
        ValueError: A layer that is ProDiaL's too or is trained as a whole; a part of a mixer,
            whose fused path reads weights and passes LoRA by; or no layer at all.
    """
    paths = [names[0] for names in _outside_adapters(model).values() if is_lora(names[0])]
    if not paths:
        raise ValueError("lora.target_modules matches nothing in this model")
    for path in paths:
        if is_prodial(path):
            raise ValueError(
                f"{path} is a target of ProDiaL and of lora; take it out of one of the two"
            )
        saved = [name for name in config.modules_to_save or () if name in path.split(".")]
        if saved:
            raise ValueError(f"{path} is a target of lora and inside modules_to_save={saved}")
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        if hasattr(owner, "A_log") or any(weight_reads(type(owner), [name])):
            raise ValueError(
                f"{path} belongs to a {type(owner).__name__}, which may read its weight instead of "
                "calling it: LoRA would have no effect there until it is merged. Name it in "
                "ProDiaL's target_modules, or take it out of lora.target_modules"
            )


def _outside_adapters(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return every module with its paths, except those inside adapted layers."""
    paths = module_paths(model)
    inside = {
        child
        for module in paths
        if isinstance(module, BaseTunerLayer)
        for child in module.modules()
        if child is not module
    }
    return {module: names for module, names in paths.items() if module not in inside}


def _check_methods(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, ProdialPeftLinear):
            continue
        if isinstance(module, ProdialLinear):
            raise ValueError(
                f"{path} is adapted by apply_prodial already; call merge_prodial(model) or "
                "remove_prodial(model) first"
            )


def _new_layer(model: nn.Module, module: nn.Module, paths: tuple[str, ...]) -> Target:
    if isinstance(module, BaseTunerLayer):
        raise ValueError(
            f"{paths[0]} has an adapter of another method, a {type(module).__module__}."
            f"{type(module).__name__}; two methods on one layer are not supported"
        )
    return target_of(model, module, paths, paths[0])
