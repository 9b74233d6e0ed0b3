"""Adding adapters to a model, merging them, and removing them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from prodial_kernels._checks import check_choice
from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import OFFSET, ProdialLinear, adapted_layers, weight_like
from prodial_kernels.methods import Method
from prodial_kernels.models.adapt.families import adapt_mixers, check_mixers
from prodial_kernels.models.adapt.foreign_bases import (
    dense_between,
    has_foreign_bases,
    note_dense_layers,
)
from prodial_kernels.models.adapt.masters import make_masters
from prodial_kernels.models.adapt.named_layer import NamedProdialLinear, check_adapter_name
from prodial_kernels.models.adapt.names import adapter_parameters, unwrapped
from prodial_kernels.models.adapt.report import AdapterReport, adapter_report
from prodial_kernels.models.adapt.snapshot import all_or_nothing, trainable_tensors
from prodial_kernels.models.adapt.state import (
    STATE,
    AdaptedState,
    known_adapter,
    refuse_wrapper,
    state_of,
    undo_all,
)
from prodial_kernels.models.adapt.targets import Saved, Target, find_saved, find_targets
from prodial_kernels.models.methods.base import Site, additions_of
from prodial_kernels.models.methods.baselines import trained_as_they_are
from prodial_kernels.models.methods.lora import stacked_on
from prodial_kernels.models.methods.low_rank import bare_layer
from prodial_kernels.models.methods.offsets import SsmParameter, find_ssm, make_offsets
from prodial_kernels.models.methods.planning import KEPT, kept_methods, plan_methods
from prodial_kernels.models.placements import resolve_placements
from prodial_kernels.module_tree import is_emptied_by_zero, place, replace_each
from prodial_kernels.quantization import (
    FORMATS,
    QuantizationError,
    QuantizationReport,
    QuantizedLinear,
)
from prodial_kernels.quantization.convert import STORED
from prodial_kernels.quantization.model import make_dense
from prodial_kernels.quantization.saving import (
    release_saving,
    settle_configuration,
    watch_saving,
)
from prodial_kernels.tuners import remember_model, tuner_layers

ModelT = TypeVar("ModelT", bound=nn.Module)


def apply_prodial(
    model: nn.Module, config: ProdialConfig, adapter: str = "default"
) -> AdapterReport:
    """Replace the targets of ``config`` by adapted layers, in place, and freeze the rest.

    The adapted model computes what it computed before until the adapter is trained. Everything
    is checked before the first change; on an error or an interrupt the model is as it was. A layer
    that the model holds at several places becomes one adapted layer at all of them. Train and eval
    mode, devices and dtypes stay; adapters are fp32 (fp64 in an fp64 model), and so are 16-bit
    parameters of ``modules_to_save``, which are read in the dtype that they had.

    Args:
        model: Any module. It keeps its class and its own methods.
        config: What to adapt and how.
        adapter: The adapter's name, for models that get several (``add_adapter``).

    Returns:
        What is trained now; prints as a table.

    Raises:
        TypeError: ``config`` is not a ``ProdialConfig``, or ``model`` no module.
        ValueError: The configuration does not fit the model: nothing matches, a name matches
            nothing, a match is neither a plain ``nn.Linear`` nor in a format that is read, a target
            matches in only some of the layers (see ``allow_partial``), a block count does not
            divide ``in_features``, ``modules_to_save`` or ``train_ssm`` matches nothing, a mixer
            would bypass its adapter, the model is already adapted, it carries layers of PEFT, which
            would be frozen, or an ``adapter`` that cannot be a name.
    """
    if not isinstance(config, ProdialConfig):
        raise TypeError(f"config must be a ProdialConfig, got {type(config).__name__}")
    check_adapter_name(adapter)
    refuse_wrapper(model, "apply_prodial")
    model = unwrapped(model)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model is itself an nn.Linear, which has no parent to be replaced in; use "
            "ProdialLinear.from_linear(model, ...)"
        )
    if STATE in vars(model) or adapted_layers(model):
        raise ValueError(
            "the model is already adapted; call remove_prodial(model) or merge_prodial(model) "
            "first, or add_adapter(model, NAME, config) for a second adapter beside the first"
        )
    if others := tuner_layers(model):
        raise ValueError(
            f"the model carries {len(others)} layers of PEFT, such as {others[0]}, whose "
            "parameters apply_prodial would freeze; merge them first (merge_and_unload), call "
            "apply_prodial before get_peft_model and requires_grad_(True) on the parameters named "
            "prodial_* after it, or train both as one adapter: get_peft_model with a "
            "prodial_kernels.peft.ProdialPeftConfig(lora=LoraConfig(...))"
        )
    # Names of layers are what a file of the adapter keeps.
    config = resolve_placements(model, config)
    targets = find_targets(model, config)
    saved = find_saved(model, config, targets)
    moved = find_ssm(model, config.train_ssm)
    bare = find_bare(model, config, targets)
    paths = {path for target in targets for path in target.paths}
    sites = plan_methods(model, config.methods, paths)
    _check_trained_once(saved, moved, sites)
    in_place = {id(p): p for m in config.methods for p in trained_as_they_are(model, m)}
    check_mixers(model, [*targets, *bare])
    warn_of_rank(targets, config.r)

    named = list(model.named_parameters(remove_duplicate=False))
    flags = {name: parameter.requires_grad for name, parameter in named}
    state = AdaptedState({adapter: config}, adapter, flags)
    with all_or_nothing(model):
        layers = [_adapted(target, config, adapter) for target in targets]
        layers += [bare_layer(target.linear) for target in bare]
        model.requires_grad_(False)
        trained = [parameter for match in saved for parameter in match.parameters()]
        trained += [p for key, p in in_place.items() if key not in {*map(id, trained)}]
        for parameter in trained:
            parameter.requires_grad_(parameter.is_floating_point())
        for target, layer in zip([*targets, *bare], layers, strict=True):
            place(model, target.paths, layer)
        state.parameters += make_masters(model, trained)
        state.parameters += make_offsets(moved)
        for site in sites:
            state.parameters.append(site.install())
        state.mixers += adapt_mixers(model)
        setattr(model, STATE, state)
        watch_saving(model)
        remember_model(model, layers)
        return adapter_report(model)


def apply_methods(model: nn.Module, methods: Iterable[ProdialConfig | Method]) -> AdapterReport:
    """Let a list of methods train ``model``, in place, and freeze the rest.

    ``apply_prodial(model, ProdialConfig.of(methods))``: all that is done with an adapted model is
    done with this one.

    Args:
        model: Any module. It keeps its class and its own methods.
        methods: Of :mod:`prodial_kernels.methods`, and at most one ``ProdialConfig``.

    Returns:
        What is trained now; prints as a table.

    Raises:
        TypeError: Something else is in the list.
        ValueError: As for :func:`apply_prodial`, or methods that do not go together.
    """
    return apply_prodial(model, ProdialConfig.of(methods))


def find_bare(model: nn.Module, config: ProdialConfig, targets: Iterable[Target]) -> list[Target]:
    """Return the layers that become adapted layers for the terms of methods alone.

    ValueError where a name matches nothing, or a match cannot be adapted.
    """
    wanted = stacked_on(model, config.methods)
    if wanted is None:
        return []
    adapted = {target.module for target in targets}
    try:
        bare = [t for t in find_targets(model, wanted) if t.module not in adapted]
    except ValueError as error:
        raise ValueError(f"methods with low-rank terms: {error}") from error
    for target in bare:
        if target.original is not None:
            raise ValueError(
                f"{target.paths[0]} is stored by another library; give it a ProDiaL adapter "
                "(train_scale=False, train_diagonal=False is plain LoRA) in the place of a method"
            )
    return bare


@trainable_tensors()
def merge_prodial(model: ModelT, *, keep: bool = False) -> ModelT:
    """Turn an adapted model into a plain one with the adapted weights, in place.

    Each adapted layer becomes an ``nn.Linear`` with weight W', dense on a quantised base too;
    layers are replaced one at a time, so memory grows by one layer only (on a quantised base, by
    what the dense weights take more). Quantised layers without an adapter become dense too, so
    that the model can be saved as any other. ``requires_grad`` is as it was before
    ``apply_prodial``. A weight that was tied to another one is no longer tied, and
    ``model.config`` says so; nor does it let transformers rescale weights when they are loaded.

    Args:
        model: An adapted model.
        keep: Merge what can be, and keep methods whose effect is no weight's (ParallelAdapter), so
            that the model stays an adapted one, of these methods alone, on the merged weights.

    Returns:
        ``model``.

    Raises:
        ValueError: ``apply_prodial`` was not called on this model, it has methods that cannot be
            merged and ``keep`` is False, a W' is not finite, which is found before the first layer
            is replaced, or the model is sharded.
    """
    inner = unwrapped(model)
    state = state_of(model, taking_out="merge_prodial")
    if keep and state.unfinished is None:
        state.kept = _take_kept(inner, state)
    _check_mergeable(inner, state)
    state.unfinished = "merge_prodial"
    _fold_offsets(state)
    foreign = has_foreign_bases(inner)
    replace_each(
        inner, ProdialLinear, lambda _, layer: dense_between(inner, layer, layer.to_linear())
    )
    make_dense(inner)
    if foreign:
        note_dense_layers(inner)
    settle_configuration(inner)
    _detach(inner, state)
    if state.kept is not None:
        _put_kept(inner, state)
    return model


@trainable_tensors()
def merge_quantized(model: nn.Module, format: str) -> QuantizationReport:
    """Merge as :func:`merge_prodial` does, into layers stored in ``format``, in place.

    With ``"stored"``, each into the format that the layer is stored in, in the same groups and
    dtypes, and dense where it is dense.

    One dense weight exists at a time. W' lies between the values that a format has, even where W
    was one of them, so this loses part of what was trained: compare before it is used.

    Args:
        model: An adapted model, on a dense or a quantised base.
        format: ``"nf4"``, ``"int8"``, ``"fp8"`` or ``"stored"``.

    Returns:
        What quantising each W' lost.

    Raises:
        ValueError: As for :func:`merge_prodial`, or an unknown format.
    """
    check_choice("format", format, (*FORMATS, STORED))
    model = unwrapped(model)
    state = state_of(model, taking_out="merge_quantized")
    _check_mergeable(model, state)
    state.unfinished = "merge_quantized"
    _fold_offsets(state)
    errors: dict[str, QuantizationError] = {}
    before = after = 0

    def quantized(path: str, adapted: ProdialLinear) -> nn.Module:
        nonlocal before, after
        if format == STORED and not isinstance(adapted.base_layer, QuantizedLinear):
            return adapted.to_linear()
        layer, errors[path] = adapted.to_quantized(format)
        before += layer.in_features * layer.out_features * layer.dtype.itemsize
        after += layer.packed_bytes
        return layer

    replace_each(model, ProdialLinear, quantized)
    _detach(model, state)
    return QuantizationReport(format, errors, before, after)


def remove_prodial(model: ModelT) -> ModelT:
    """Remove the adapters and restore the layers that they wrapped, in place.

    ``requires_grad`` is as it was before ``apply_prodial``. What was trained as it is, by
    ``modules_to_save``, ``LinearProbe`` or ``Full``, keeps its values. On an error or an interrupt
    the model is as it was.

    Returns:
        ``model``.

    Raises:
        ValueError: ``apply_prodial`` was not called on this model.
    """
    inner = unwrapped(model)
    state = state_of(model)
    with all_or_nothing(inner):
        replace_each(inner, ProdialLinear, lambda _, layer: layer.original_layer())
        _detach(inner, state)
        return model


def get_prodial_config(model: nn.Module, adapter: str | None = None) -> ProdialConfig:
    """Return the configuration of an adapter, the active one by default; ValueError for none."""
    state = state_of(model)
    return state.config if adapter is None else state.adapters[known_adapter(state, adapter)]


def _check_trained_once(
    saved: Iterable[Saved], moved: Iterable[SsmParameter], sites: Iterable[Site]
) -> None:
    """Raise ValueError where two options train the same parameter."""
    moved = list(moved)
    offsets = {f"{site.path}.{name}" for site in sites for name in site.shapes}
    for parameter in moved:
        path, _, name = parameter.path.rpartition(".")
        if f"{path}.{OFFSET}{name}" in offsets:
            raise ValueError(
                f"{parameter.path} is in train_ssm={parameter.part!r} and in a method; take it out "
                "of one of the two"
            )
    saved = list(saved)
    for match in saved:
        for name, _ in () if match.parameter else match.module.named_parameters():
            path, _, leaf = f"{match.path}.{name}".rpartition(".")
            if f"{path}.{OFFSET}{leaf}" in offsets:
                raise ValueError(
                    f"{path}.{leaf} is in modules_to_save ({match.path}) and in a method; name the "
                    "module in LinearProbe(head=(...,)) in the place of modules_to_save"
                )
    owned = {id(parameter): match.path for match in saved for parameter in match.parameters()}
    for parameter in moved:
        if id(parameter.value) in owned:
            raise ValueError(
                f"{parameter.path} is in train_ssm={parameter.part!r} and in modules_to_save "
                f"({owned[id(parameter.value)]}); take it out of one of the two"
            )


def _fold_offsets(state: AdaptedState) -> None:
    for handle in additions_of(state.parameters):
        handle.fold()


def _adapted(target: Target, config: ProdialConfig, adapter: str) -> ProdialLinear:
    """Return the layer that replaces a target, its adapter active and trained."""
    if target.original is None:
        return ProdialLinear.from_config(target.linear, config, target.name)
    layer = NamedProdialLinear(target.linear, target.original)
    layer.add_adapter(adapter, config, target.name)
    layer.set_adapter(adapter)
    return layer


def warn_of_rank(targets: Iterable[Target], r: int) -> None:
    """Warn where r makes the LoRA part full rank: it then has more parameters than W."""
    narrow = {
        (target.linear.in_features, target.linear.out_features)
        for target in targets
        if r >= min(target.linear.in_features, target.linear.out_features)
    }
    # The default rank on the narrow layers of a toy model costs too little for a warning.
    if narrow and r > ProdialConfig.r:
        k, n = min(narrow, key=min)
        warnings.warn(
            f"r={r} is not below min(in_features, out_features)={min(k, n)} of a layer {k} -> {n}: "
            f"its LoRA part trains {r * (k + n):,} parameters where the layer has {k * n:,}; "
            f"choose r below {min(k, n)}",
            stacklevel=3,
        )


def _check_mergeable(model: nn.Module, state: AdaptedState) -> None:
    """Raise ValueError where a W' is not finite or sharded, before any layer is replaced."""
    kept = kept_methods(state.config.methods)
    if kept and state.kept is None:
        raise ValueError(
            f"{', '.join(kept)} cannot be merged: its effect is no weight's, and a plain model "
            "cannot have it; the model is unchanged. Save it with save_adapter, or merge the rest "
            "with merge_prodial(model, keep=True)"
        )
    for handle in () if state.unfinished else additions_of(state.parameters):
        for name in handle.views:
            value = getattr(handle.module, name)
            if isinstance(value, Tensor) and not value.is_meta and not value.isfinite().all():
                raise ValueError(
                    f"{name} of a {type(handle.module).__name__} is not finite with its offset; "
                    "the model is unchanged"
                )
    for path, layer in ({} if state.unfinished else adapted_layers(model)).items():
        shards = [name for name, p in layer.named_parameters() if hasattr(p, "full_tensor")]
        if shards:
            raise ValueError(
                f"{path}.{shards[0]} is sharded (a DTensor), and a part of a weight cannot be "
                "merged; call save_adapter in every process, then load_adapter and merge_prodial "
                "on a model in one piece, or 'prodial merge'"
            )
        emptied = [name for name, p in layer.named_parameters() if is_emptied_by_zero(p)]
        if emptied:
            raise ValueError(
                f"{path}.{emptied[0]} is divided among processes by DeepSpeed's ZeRO-3, and a part "
                "of a weight cannot be merged; save the adapter (prodial_kernels/checkpoint's "
                "README says how), then merge on a model in one piece, or by 'prodial merge'"
            )
        with torch.no_grad():
            merged = layer.adapted_weight()
        if not merged.is_meta and not merged.isfinite().all():
            raise ValueError(
                f"{path}: the merged weight would not be finite (NaN or inf) in "
                f"{weight_like(layer.base_layer).dtype}: the adapter or the base weight is not, "
                "or they overflow; the model is unchanged"
            )


def _take_kept(model: nn.Module, state: AdaptedState) -> dict[str, Tensor] | None:
    """Take methods that cannot be merged out of ``model``; return their tensors by plain names."""
    handles = [h for h in additions_of(state.parameters) if type(h.method) in KEPT]
    if not handles:
        return None
    own = {id(h.module._parameters[name]) for h in handles for name in h.names}
    tensors = {
        name: parameter.detach()
        for name, parameter in adapter_parameters(model).items()
        if id(parameter) in own
    }
    undo_all([*handles, *state.mixers])
    state.mixers = []
    state.parameters = [handle for handle in state.parameters if handle not in handles]
    return tensors


def _put_kept(model: nn.Module, state: AdaptedState) -> None:
    """Put the methods of :func:`_take_kept` into the merged model."""
    methods = [method for method in state.config.methods if type(method) in KEPT]
    apply_methods(model, methods)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_((state.kept or {})[name])


def _detach(model: nn.Module, state: AdaptedState) -> None:
    undo_all([*state.parameters, *state.mixers])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])
    release_saving(model)
    delattr(model, STATE)
