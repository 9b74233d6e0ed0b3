"""Resolving a configuration to the modules of a model, or refusing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prodial_kernels.config import ProdialConfig, resolve_block_size
from prodial_kernels.models.adapt.aliases import second_name
from prodial_kernels.models.adapt.foreign_bases import dtype_between_layers
from prodial_kernels.models.placements import placed, resolve_placements
from prodial_kernels.module_patterns import matches_name
from prodial_kernels.module_tree import has_hooks, module_paths
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.foreign import from_foreign, is_foreign, is_linear
from prodial_kernels.quantization.modules.experts import QuantizedStack

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """One linear layer to adapt.

    Attributes:
        linear: What is adapted: the model's layer, dense or quantised, or what was read from it.
        paths: Every dotted path under which the model holds it; more than one when it is shared.
        name: The entry of ``target_modules`` that matched it.
        original: The model's layer, if ``linear`` is another one: a quantised layer of another
            library.
    """

    linear: nn.Linear | QuantizedLinear
    paths: tuple[str, ...]
    name: str
    original: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The layer that the model holds."""
        return self.linear if self.original is None else self.original


@dataclass(frozen=True)
class Saved:
    """A module, or one parameter, that is trained as it is beside the adapter.

    Attributes:
        path: Its dotted path in the model, the first of several.
        module: The module, or the one that holds the parameter.
        parameter: The parameter's name in ``module``; None for the whole module.
    """

    path: str
    module: nn.Module
    parameter: str | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained, and the integer parameters that a whole module has."""
        if self.parameter is None:
            yield from self.module.parameters()
        else:
            # From the registry: read as an attribute, a master has 16 bits.
            parameter = self.module._parameters[self.parameter]
            if parameter is not None:
                yield parameter


def path_pattern(path: str) -> str:
    """Replace the layer numbers of a dotted path by ``*``, so that equal layers look equal."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def find_targets(model: nn.Module, config: ProdialConfig) -> list[Target]:
    """Return the layers that ``config.target_modules`` matches, in the model's order.

    Raises:
        ValueError: Nothing matches, a name matches nothing, a match cannot be adapted, a target
            matches in only some of the layers, a block count does not divide ``in_features``, or a
            module holds a target or its weight under a second name.
    """
    config = resolve_placements(model, config)
    paths = module_paths(model)
    targets = []
    for module, module_names in paths.items():
        if isinstance(module, QuantizedStack):
            # Of a mixture's experts in one tensor, which dense is a parameter and has no such path.
            continue
        matches = [name for path in module_names if (name := config.target_of(path)) is not None]
        if matches:
            targets.append(target_of(model, module, module_names, matches[0]))
    linears = {m: names for m, names in paths.items() if is_linear(m)}
    _check_names_used(model, config, targets, linears.values())
    if not config.allow_partial:
        _check_every_layer(targets, linears)
    for target in targets:
        try:
            resolve_block_size(target.linear.in_features, **config.blocks_of(target.name))
        except ValueError as error:
            raise ValueError(f"{target.paths[0]}: {error}") from error
    refuse_second_names(model, {target.module: target.paths[0] for target in targets})
    return targets


def target_of(model: nn.Module, module: nn.Module, paths: tuple[str, ...], name: str) -> Target:
    """Return the target at ``paths``, read from another library's format if it is in one.

    Raises:
        ValueError: An adapted layer could not replace it.
    """
    if not is_foreign(module):
        return Target(require_adaptable(paths[0], module, name), paths, name)
    if has_hooks(module):
        _refuse_hooks(f"target {name!r} matches {paths[0]!r}")
    try:
        return Target(from_foreign(module, dtype_between_layers(model)), paths, name, module)
    except ValueError as error:
        raise ValueError(f"{paths[0]} cannot be adapted: {error}") from error


def refuse_second_names(model: nn.Module, layers: dict[nn.Module, str]) -> None:
    """Raise ValueError where ``model`` refers to one of ``layers`` outside its module tree.

    Args:
        model: The model.
        layers: Layers that are to be replaced, and a path of each.
    """
    held = second_name(model, layers)
    if held is not None:
        path, name = held
        raise ValueError(
            f"{name} holds {path}, or its weight, under a second name: what uses that would go on "
            "without the adapter; remove the attribute and let the module call the layer, or take "
            "the layer out of target_modules"
        )


def find_saved(model: nn.Module, config: ProdialConfig, targets: Iterable[Target]) -> list[Saved]:
    """Return what ``config.modules_to_save`` names: it stays trainable beside the adapter.

    A name means every module whose path ends with it; if there is none, every parameter.

    Raises:
        ValueError: A name matches no module with floating-point parameters and no such parameter,
            or a match contains or shares the weight of a layer that is to be adapted.
    """
    paths = module_paths(model)
    saved = []
    for name in config.modules_to_save:
        matches = list(_saved_modules(paths, name)) or list(_saved_parameters(model, name))
        if not matches:
            owners = (names for m, names in paths.items() if any(True for _ in m.parameters(False)))
            raise ValueError(
                f"modules_to_save={name!r} matches no module with floating-point parameters and no "
                f"such parameter; modules of this model that have parameters: {_patterns(owners)}"
            )
        for match in matches:
            owned = {id(parameter) for parameter in match.parameters()}
            for target in targets:
                # The bias of an adapted layer is not adapted, and may be trained by its own name.
                shared = target.module.named_parameters()
                if not owned.isdisjoint(
                    id(p) for own, p in shared if match.parameter is None or own == "weight"
                ):
                    raise ValueError(
                        f"modules_to_save={name!r} ({match.path}) contains or shares the weight of "
                        f"{target.paths[0]}, which is also a target; a weight is either adapted "
                        "(frozen) or trained itself: take one of the two out"
                    )
            saved.append(match)
    return saved


def _saved_modules(paths: Mapping[nn.Module, tuple[str, ...]], name: str) -> Iterator[Saved]:
    for module, names in paths.items():
        if any(matches_name(path, name) for path in names) and any(
            parameter.is_floating_point() for parameter in module.parameters()
        ):
            yield Saved(names[0], module)


def _saved_parameters(model: nn.Module, name: str) -> Iterator[Saved]:
    for path, parameter in model.named_parameters():
        # An adapted layer's bias goes by the name that it has in the plain model.
        plain = path.replace(".base_layer.", ".")
        if matches_name(plain, name) and parameter.is_floating_point():
            owner, _, own = path.rpartition(".")
            yield Saved(plain, model.get_submodule(owner), own)


def require_adaptable(path: str, module: nn.Module, name: str) -> nn.Linear | QuantizedLinear:
    """Return ``module``, or raise ValueError where an adapted layer could not replace it."""
    kind = f"target {name!r} matches {path!r}, a {type(module).__module__}.{type(module).__name__}"
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise ValueError(f"{kind}, not an nn.Linear; make target_modules match linear layers only")
    own: Callable[..., Tensor] = QuantizedLinear.forward
    if isinstance(module, nn.Linear):
        own = nn.Linear.forward
        weight = module.weight
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"{kind} with a weight that is sharded already, and adapters would not be part of "
                "what FSDP2 manages: call apply_prodial or load_adapter first, then "
                "fully_shard"
            )
        # A Parameter subclass is some library's storage format (bitsandbytes, torchao, DTensor).
        if type(weight) is not nn.Parameter or weight.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"{kind} with a {type(weight).__name__} weight of dtype {weight.dtype}; quantised "
                "(by another library), sharded or parametrised weights cannot be adapted: load the "
                "model in bfloat16, float16 or float32; prodial_kernels.quantization quantises it"
            )
    if type(module).forward is not own or "forward" in vars(module):
        raise ValueError(
            f"{kind} with a forward of its own, which an adapted layer would not run; adapt the "
            "plain nn.Linear"
        )
    if has_hooks(module):
        _refuse_hooks(kind)
    return module


def _refuse_hooks(kind: str) -> None:
    raise ValueError(
        f"{kind} with hooks, which an adapted layer would not run; remove them, and register "
        "them again after apply_prodial"
    )


def _check_names_used(
    model: nn.Module,
    config: ProdialConfig,
    targets: Iterable[Target],
    linear_paths: Iterable[tuple[str, ...]],
) -> None:
    used = {target.name for target in targets}
    names = config.target_modules
    unused = [n for n in ((names,) if isinstance(names, str) else names) if n not in used]
    if unused:
        reason = " (or only modules that an earlier name already matches)" if used else ""
        if isinstance(names, str):
            reason = ": a string is an expression for whole dotted paths; give names as a list"
        hint = ""
        if config.target_modules == ProdialConfig.target_modules:
            with suppress(ValueError):
                hint = f'; target_modules="mixer" means {" ".join(placed(model, "mixer"))}'
        raise ValueError(
            f"target_modules {unused} matches nothing in this model{reason}; "
            f"its nn.Linear layers: {_patterns(linear_paths)}{hint}"
        )


def _check_every_layer(
    targets: Iterable[Target], linears: Mapping[nn.Module, tuple[str, ...]]
) -> None:
    adapted: dict[nn.Module, str] = {target.module: target.name for target in targets}
    names = {
        path_pattern(path): name for module, name in adapted.items() for path in linears[module]
    }
    missed: dict[str, list[str]] = {}
    for module, paths in linears.items():
        for pattern in {path_pattern(path) for path in paths} & names.keys():
            if module not in adapted:
                missed.setdefault(pattern, []).append(paths[0])
    for pattern, left_out in missed.items():
        raise ValueError(
            f"target {names[pattern]!r} matches only some of the layers {pattern!r}: it leaves "
            f"out {', '.join(left_out)}; make it match them all, or set allow_partial=True"
        )


def _patterns(paths: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(dict.fromkeys(path_pattern(names[0]) for names in paths)) or "none"
