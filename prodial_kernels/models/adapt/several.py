"""Several named adapters in one model: added, switched, listed, deleted, combined.

``apply_prodial(model, config, "first")`` puts the first one in, and ``adapter_disabled(model)``
switches whichever is active off. The layers are those that PEFT's method uses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import nn

from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import ProdialLinear, adapted_layers, forget_decoding_graphs
from prodial_kernels.models.adapt.combine import (
    Combination,
    check_combination,
    combination_of,
    fill_combination,
)
from prodial_kernels.models.adapt.families import adapt_mixers, check_mixers
from prodial_kernels.models.adapt.inject import warn_of_rank
from prodial_kernels.models.adapt.named_layer import (
    PARTS,
    NamedProdialLinear,
    check_adapter_name,
    give_name,
)
from prodial_kernels.models.adapt.names import plain_path, unwrapped
from prodial_kernels.models.adapt.snapshot import Snapshot, all_or_nothing
from prodial_kernels.models.adapt.state import (
    STATE,
    AdaptedState,
    known_adapter,
    refuse_wrapper,
    state_of,
    undo_all,
)
from prodial_kernels.models.adapt.targets import find_targets
from prodial_kernels.module_tree import module_paths, place, replace_each
from prodial_kernels.quantization.saving import watch_saving
from prodial_kernels.tuners import remember_model


def list_adapters(model: nn.Module) -> dict[str, ProdialConfig]:
    """Return the configuration of every adapter of ``model``, by name; ValueError for none."""
    return dict(state_of(model).adapters)


def active_adapter(model: nn.Module) -> str:
    """Return the name of the adapter that ``model`` computes with; ValueError without one.

    It stays the active one while ``adapter_disabled`` switches it off.
    """
    return state_of(model).active


def add_adapter(model: nn.Module, adapter: str, config: ProdialConfig) -> None:
    """Add a second or further adapter, with its own rank, blocks and layers, in place.

    It is at its initial values, computes nothing and trains nothing until :func:`set_adapter`
    makes it active. The adapted layers, their hooks and the tensors of other adapters stay the same
    objects; the tensors' names become ``<layer>.prodial_D.<adapter>.weight`` and the like. On an
    error or an interrupt the model is as it was.

    Args:
        model: What ``apply_prodial`` or ``load_adapter`` was called on.
        adapter: A name that no adapter of the model has.
        config: What to adapt and how. ``modules_to_save``, ``train_ssm`` and ``methods`` must be
            empty, here and in the adapters that are there: what they name is trained in place, so
            that every adapter would change what the others compute (PEFT's method keeps copies of
            modules).

    Raises:
        TypeError: ``config`` is not a ``ProdialConfig``.
        ValueError: The name is taken or cannot be one, ``config`` does not fit the model (as for
            ``apply_prodial``), a layer is merged, or the model has no adapter yet.
    """
    if not isinstance(config, ProdialConfig):
        raise TypeError(f"config must be a ProdialConfig, got {type(config).__name__}")
    check_adapter_name(adapter)
    refuse_wrapper(model, "add_adapter")
    inner = unwrapped(model)
    state = state_of(inner)
    if adapter in state.adapters:
        raise ValueError(
            f"the model already has an adapter {adapter!r}; choose another name, or delete that one"
        )
    for name, other in {**state.adapters, adapter: config}.items():
        for option in ("modules_to_save", "train_ssm", "methods"):
            if getattr(other, option):
                shared = [getattr(each, "name", each) for each in getattr(other, option)]
                raise ValueError(
                    f"adapter {name!r} has {option}={shared}, which are "
                    "trained in place, so that all adapters of the model would share them; leave "
                    "them out, or give each adapter a model of its own"
                    + (
                        "; PEFT's method keeps a copy for each"
                        if option == "modules_to_save"
                        else ""
                    )
                )
    _refuse_merged(inner)
    with as_plain(inner):
        targets = find_targets(inner, config)
        check_mixers(inner, targets)
    warn_of_rank(targets, config.r)
    with all_or_nothing(inner):
        undo_all(state.mixers)
        by_base: dict[nn.Module, ProdialLinear] = {}
        for layer in adapted_layers(inner).values():
            give_name(layer, state.active)
            by_base[layer.original_layer()] = layer
        for target in targets:
            named = by_base.get(target.module)
            if not isinstance(named, NamedProdialLinear):
                named = NamedProdialLinear(target.linear, target.original)
                named.set_adapter(state.active)
                place(inner, target.paths, named)
            named.add_adapter(adapter, config, target.name)
            for attribute in PARTS.values():
                if adapter in named.factors(attribute):
                    named.factors(attribute)[adapter].requires_grad_(False)
        _keep(inner, replace(state, adapters={**state.adapters, adapter: config}))


def set_adapter(model: nn.Module, adapter: str) -> None:
    """Make an adapter the active one: ``model`` computes with it, and it alone trains.

    Build the optimiser after that, or give it the parameters of every adapter: those of the others
    require no gradient until they are active again.

    Raises:
        ValueError: There is no such adapter, a layer is merged, or ``model`` is wrapped in
            DistributedDataParallel, which keeps to the parameters that it found.
    """
    refuse_wrapper(model, "set_adapter")
    inner = unwrapped(model)
    state = state_of(inner)
    known_adapter(state, adapter)
    _refuse_merged(inner)
    layers = [m for m in adapted_layers(inner).values() if isinstance(m, NamedProdialLinear)]
    try:
        for layer in layers:
            layer.set_adapter(adapter)
        forget_decoding_graphs(inner)
        state.active = adapter
    except BaseException:
        for layer in layers:
            layer.set_adapter(state.active)
        raise


@contextmanager
def using_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Compute with another adapter meanwhile; then the one before is active again.

    Raises:
        ValueError: As for :func:`set_adapter`.
    """
    before = active_adapter(model)
    set_adapter(model, adapter)
    try:
        yield
    finally:
        set_adapter(model, before)


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Delete an adapter that is not active, in place; a layer that only it had is plain again.

    On an error or an interrupt the model is as it was.

    Raises:
        ValueError: There is no such adapter, or it is the active one.
    """
    inner = unwrapped(model)
    state = state_of(inner)
    known_adapter(state, adapter)
    if adapter == state.active:
        others = [name for name in state.adapters if name != adapter]
        raise ValueError(
            f"{adapter!r} is the active adapter; "
            + (
                f"call set_adapter with another one first ({others})"
                if others
                else "it is the only one: remove_prodial(model) gives the pretrained model back"
            )
        )
    with all_or_nothing(inner):
        undo_all(state.mixers)
        paths = module_paths(inner)
        for layer in adapted_layers(inner).values():
            if not isinstance(layer, NamedProdialLinear) or adapter not in layer.adapter_names:
                continue
            layer.delete_adapter(adapter)
            if not layer.adapter_names:
                place(inner, paths[layer], layer.original_layer())
        left = {name: config for name, config in state.adapters.items() if name != adapter}
        _keep(inner, replace(state, adapters=left))


def add_weighted_adapter(model: nn.Module, adapter: str, weights: Mapping[str, float]) -> None:
    """Add an adapter whose effect is the weighted sum of others': W + Σ w_i (W'_i − W).

    Exact, up to rounding, where that sum has the form of an adapter: among adapters without s
    (``train_scale=False``), and among adapters without D_b (``train_diagonal=False``); plain LoRA
    is both. Ranks add up. Dropout is that of the first. The new adapter is not made active.

    Args:
        model: An adapted model.
        adapter: The new adapter's name.
        weights: A weight for the name of each adapter to combine.

    Raises:
        TypeError: A weight that is no finite number.
        ValueError: The sum is no adapter, an unknown adapter, or a name that is taken.
    """
    inner = unwrapped(model)
    state = state_of(inner)
    configs = {name: state.adapters[known_adapter(state, name)] for name in weights}
    values = list(weights.values())
    check_combination(configs, values)
    for layer in adapted_layers(inner).values():
        if not isinstance(layer, NamedProdialLinear):
            raise ValueError(f"{[*weights]} is the model's only adapter; add a second one first")
    layers = _named_layers(inner)
    form = combination_of(configs, values, layers)
    add_adapter(inner, adapter, _config_of(form, configs))
    try:
        for layer in layers.values():
            if adapter in layer.adapter_names:
                fill_combination(layer, adapter, list(weights), values)
    except BaseException:
        delete_adapter(inner, adapter)
        raise


@contextmanager
def reading_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Give every layer the tensors and options of one adapter meanwhile, active or not.

    ValueError where ``model`` has none of that name.
    """
    inner = unwrapped(model)
    state = state_of(inner)
    known_adapter(state, adapter)
    with ExitStack() as stack:
        for layer in _named_layers(inner).values():
            stack.enter_context(layer.reading(adapter))
        yield


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Take the adapted layers out of ``model`` meanwhile, and put the very same in again."""
    before = Snapshot(model)
    state = vars(model).get(STATE)
    try:
        if isinstance(state, AdaptedState):
            undo_all(state.mixers)
        replace_each(model, ProdialLinear, lambda _, layer: layer.original_layer())
        yield
    finally:
        before.restore()


def _keep(model: nn.Module, state: AdaptedState) -> None:
    """Give the mixers the paths for the layers that are there now, and note the state."""
    layers = adapted_layers(model).values()
    setattr(model, STATE, replace(state, mixers=adapt_mixers(model)))
    watch_saving(model)
    remember_model(model, layers)
    forget_decoding_graphs(model)


def _named_layers(model: nn.Module) -> dict[str, NamedProdialLinear]:
    return {
        plain_path(path): layer
        for path, layer in adapted_layers(model).items()
        if isinstance(layer, NamedProdialLinear)
    }


def _config_of(form: Combination, configs: Mapping[str, ProdialConfig]) -> ProdialConfig:
    """Return the configuration of a combination.

    A configuration has one rank: where adapters have different layers, the highest.
    """
    first = next(iter(configs.values()))
    rank = max(form.ranks.values())
    same = all(config.target_modules == first.target_modules for config in configs.values())
    sizes: int | dict[str, int] | None = None
    targets = first.target_modules if same else tuple(form.ranks)
    if form.train_diagonal and len(set(form.sizes.values())) == 1:
        sizes = next(iter(form.sizes.values()))
    elif form.train_diagonal:
        targets = tuple(form.ranks)
        sizes = form.sizes
    return replace(
        first,
        target_modules=targets,
        allow_partial=True,
        r=rank,
        lora_alpha=float(rank),
        n_blocks=None,
        block_size=sizes,
        diagonal=form.diagonal,
        train_scale=form.train_scale,
        train_diagonal=form.train_diagonal,
    )


def _refuse_merged(model: nn.Module) -> None:
    merged = [path for path, layer in adapted_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(
            f"the adapter is merged in {merged[0]} and {len(merged) - 1} other layers, so another "
            "one would have no effect there; call unmerge() on them first"
        )
