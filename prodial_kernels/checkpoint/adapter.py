"""Saving an adapter to a directory, and loading it into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialise_safetensors
from torch import Tensor, nn

from prodial_kernels.checkpoint.card import write_card
from prodial_kernels.checkpoint.contents import (
    Contents,
    base_without,
    configured_beside,
    contents_of,
    expected_shapes,
    is_adapter_tensor,
)
from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE, read_files, write_files
from prodial_kernels.checkpoint.fingerprint import (
    all_finite,
    check_has_values,
    check_layers,
    check_not_emptied,
    check_values,
    describe_base,
    describe_layers,
)
from prodial_kernels.checkpoint.first_format import check_first_base, convert_tensors
from prodial_kernels.checkpoint.peft_form import file_name, peft_fields, plain_name
from prodial_kernels.checkpoint.sharded import by_the_first, fill, is_sharded, whole
from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import adapted_layers
from prodial_kernels.models.adapt.inject import apply_prodial, get_prodial_config, remove_prodial
from prodial_kernels.models.adapt.names import base_state, plain_path, unwrapped
from prodial_kernels.models.adapt.report import AdapterReport, adapter_report
from prodial_kernels.models.adapt.several import (
    add_adapter,
    as_plain,
    delete_adapter,
    list_adapters,
    reading_adapter,
)
from prodial_kernels.models.adapt.state import STATE, check_model
from prodial_kernels.models.adapt.targets import find_targets
from prodial_kernels.quantization import QuantizedLinear

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError)


@dataclass(frozen=True)
class SavedAdapter:
    """A directory's adapter, verified against its checksums.

    Attributes:
        config: The configuration it was trained with.
        tensors: By name, on the CPU: ``<module path>.prodial_*`` (the scale as s − 1, whatever the
            format keeps), and what was trained beside: the tensors of ``config.modules_to_save``,
            parameters that were set to require a gradient, running statistics.
        base: Fingerprint of the base model (:func:`describe_base`).
        base_model: Name of the base model as given to :func:`save_adapter`, or None.
        package_version: Version of this package that wrote it.
        format_version: Of the files: 1 kept s, and a few values of the base; 2 named tensors as
            here; 3 is today's, which names them in the file as PEFT does.
    """

    config: ProdialConfig
    tensors: dict[str, Tensor]
    base: Mapping[str, Any]
    base_model: str | None
    package_version: str
    format_version: int

    @property
    def base_format(self) -> str | None:
        """How the adapted weights were stored: ``"dense"``, ``"nf4"``, ``"int8"``, ``"fp8"``.

        None where they differ, or where the file does not say, as in format 1.
        """
        formats = {layer.get("format") for layer in self.base["layers"].values()}
        return formats.pop() if len(formats) == 1 else None

    @property
    def base_stored(self) -> tuple[str, ...]:
        """Names of the base's tensors that were stored in 4 or 8 bits, adapted or not."""
        tensors: Mapping[str, Any] = self.base.get("tensors", {})
        return tuple(
            name
            for name, each in tensors.items()
            if isinstance(each, Mapping) and each.get("format") is not None
        )


def save_adapter(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    base_model: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write an adapter of ``model``, and all that is trained beside it, to ``directory``.

    Two files: ``adapter_model.safetensors`` and ``adapter_config.json``, and a model card beside
    them, unless somebody wrote a ``README.md`` of his own. The directory always holds the previous
    adapter or this one, even if the process is killed. Tensors keep their dtype. PEFT reads the
    files too, after ``import prodial_kernels.peft``, where they hold nothing but the layers'
    adapters. Beside the adapter it holds what ``modules_to_save`` names, every other parameter that
    requires a gradient, and the running statistics of layers such as ``BatchNorm``.

    Every value of the base model is read, to recognise it by
    (:func:`~prodial_kernels.checkpoint.hashing.hash_tensor` says how fast).

    Of a model that is divided among processes (FSDP2's ``fully_shard``), every process must call
    it: each tensor is gathered in turn, the first process writes, and all return when it has.

    Args:
        model: What ``apply_prodial`` or ``load_adapter`` was called on, also inside the wrapper of
            ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``.
        directory: Created if it does not exist; an adapter already in it is replaced.
        base_model: Name or path of the base model, for people and the command line to find it by.
            Default: ``model.name_or_path`` where there is one, as in transformers.
        adapter: Name of the adapter to write, of several; default: the active one.

    Raises:
        AdapterError: The model has no adapter, or none of that name, or another layer stands in
            the place of an adapted one; its weights are on the meta device, a trained value is NaN
            or inf, or ``base_model`` is not printable.
        OSError: The disk is full, or the place cannot be written.
    """
    from prodial_kernels._version import __version__

    config = _config_of(model, adapter)
    model = unwrapped(model)
    with _reading(model, adapter):
        contents = contents_of(model, config)
    _check_none_replaced(model, config)
    tensors = contents.adapter | contents.beside
    for name, tensor in tensors.items():
        check_has_values(name, tensor)
    together = any(
        isinstance(tensor, Tensor) and is_sharded(tensor)
        for tensor in (*tensors.values(), *contents.base.values())
    )
    tensors = {name: whole(tensor) for name, tensor in tensors.items()}
    _check_values(tensors, "this adapter cannot be saved", "It diverged; go back to an earlier one")
    if base_model is None:
        own_name = getattr(model, "name_or_path", None)
        if isinstance(own_name, str) and own_name.isprintable():
            base_model = own_name or None
    elif not (isinstance(base_model, str) and base_model.isprintable()):
        raise AdapterError(f"base_model must be a name in printable letters, got {base_model!r}")
    recognised = peft_fields(model, config, base_model, beside=bool(contents.beside))
    header = {
        **recognised,
        "package_version": __version__,
        "base_model": base_model,
        "config": config.to_dict(),
        "tensors": {name: describe_tensor(tensor) for name, tensor in tensors.items()},
        "base": describe_base(contents.base, contents.linears),
    }
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    owned = {
        file_name(name): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }

    def write() -> None:
        payload = serialise_safetensors(owned, metadata={"format": "pt"})
        write_files(Path(directory), header, payload)
        write_card(Path(directory), config, base_model, in_peft=bool(recognised))

    if together:
        by_the_first(write)
    else:
        write()


def read_adapter(directory: str | PathLike[str]) -> SavedAdapter:
    """Read and verify the adapter in ``directory``, without a model.

    Raises:
        AdapterError: Something is missing, damaged, changed by hand, or of another version, or a
            value is one that no training can have left.
        OSError: A file exists but cannot be read.
    """
    directory = Path(directory)
    header, payload = read_files(directory)
    try:
        tensors = parse_safetensors(payload)
        if header["format_version"] > 2:
            tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
        config = ProdialConfig.from_dict(header["config"])
        listed = _dictionary(header, "tensors")
        base = _dictionary(header, "base")
        for path, layer in _dictionary(base, "layers").items():
            if not isinstance(layer, dict) or not isinstance(layer.get("format", ""), str):
                raise TypeError(f"base.layers has {layer!r} for {path!r}")
        saved = SavedAdapter(
            config, tensors, base, _printable(header, "base_model"),
            _printable(header, "package_version") or "unknown", header["format_version"],
        )  # fmt: skip
    except (SafetensorError, *_MALFORMED) as error:
        raise AdapterError(
            f"the adapter in {directory} cannot be read although its checksums match "
            f"({type(error).__name__}: {error}); save it again"
        ) from error
    found = {name: describe_tensor(tensor) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | listed.keys()):
        if found.get(name) != listed.get(name) or not name.isprintable():
            raise AdapterError(
                f"{directory / TENSOR_FILE} holds {name!r} as {found.get(name, 'missing')}, but "
                f"{CONFIG_FILE} lists it as {listed.get(name, 'missing')}; save it again"
            )
    if saved.format_version == 1:
        saved = replace(saved, tensors=convert_tensors(tensors))
    _check_values(
        saved.tensors, f"the adapter in {directory} cannot be used",
        "No training that worked can have left that; take another save of it",
    )  # fmt: skip
    return saved


def load_adapter(
    model: nn.Module, directory: str | PathLike[str], *, adapter: str | None = None
) -> AdapterReport:
    """Load the adapter in ``directory`` into ``model``, in place.

    A plain model gets the saved configuration by ``apply_prodial`` first. In an adapted model, the
    adapter called ``adapter`` is filled, which must have that configuration (``impl`` aside), or,
    if there is none of that name, added beside the others as by ``add_adapter``: the active one
    stays active. Everything is checked before the first change, and on an error the model is as it
    was. What was trained beside the adapter is put in too, and requires a gradient again; where
    several adapters would share it, it must be what the model holds already.

    The base may be in another floating-point dtype than the one the adapter was trained on. The
    adapter's tensors are never narrowed; those trained beside it take the model's dtype.

    Args:
        model: A plain model, or an adapted one.
        directory: What ``save_adapter`` wrote.
        adapter: The adapter's name in the model; default: the active one's, and ``"default"`` in a
            plain model.

    Returns:
        What is trained now; prints as a table.

    Raises:
        AdapterError: The adapter is missing, damaged, of another version, or does not belong to
            this model: another base, other layers, other shapes, or another configuration.
        OSError: A file exists but cannot be read.
        TypeError: ``model`` is no module.
    """
    origin = f"the adapter in {directory}"
    saved = read_adapter(directory)
    if saved.base_model is not None:
        origin += f" (base model {saved.base_model!r})"
    check_model(model)
    model = unwrapped(model)
    adapted = adapted_layers(model)
    holds = bool(adapted) or STATE in vars(model)
    known = _adapters_of(model) if holds else {}
    if holds and (adapter is None or adapter in known):
        _check_same_config(_config_of(model, adapter), saved.config, origin)
        if any(layer.merged for layer in adapted.values()):
            raise AdapterError("the model's adapter is merged; call unmerge() on its layers first")
        with _reading(model, adapter):
            contents = contents_of(model, saved.config)
            shapes = {name: list(tensor.shape) for name, tensor in contents.adapter.items()}
            beside = _check_fits(model, saved, shapes, contents, origin)
            if len(known) > 1:
                _check_shared(beside, saved, origin)
            _copy_into(contents.adapter | beside, saved.tensors, origin)
    else:
        with as_plain(model):
            contents = _prospective(model, saved, origin)
            try:
                targets = find_targets(model, saved.config)
                shapes = expected_shapes(model, targets, saved.config)
            except ValueError as error:
                raise AdapterError(f"{origin} does not fit this model: {error}") from error
            beside = _check_fits(model, saved, shapes, contents, origin)
        if known:
            _check_shared(beside, saved, origin)
        with _added(model, saved.config, adapter, origin), _reading(model, adapter):
            tensors = contents_of(model, saved.config).adapter
            _copy_into(tensors | beside, saved.tensors, origin)
    for tensor in beside.values():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_()
    return adapter_report(model)


def _prospective(model: nn.Module, saved: SavedAdapter, origin: str) -> Contents:
    """Return :func:`contents_of` of a plain model as if adapted, without the adapter's tensors."""
    try:
        targets = find_targets(model, saved.config)
        state = base_state(model)
        beside = configured_beside(model, saved.config, state)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"{origin} does not fit this model: {error}") from error
    linears = {plain_path(target.paths[0]): target.linear for target in targets}
    return Contents({}, beside, base_without(state, {}), linears)


def _check_fits(
    model: nn.Module,
    saved: SavedAdapter,
    shapes: Mapping[str, list[int]],
    contents: Contents,
    origin: str,
) -> dict[str, Tensor]:
    """Raise AdapterError unless ``saved`` belongs to ``model``, which is not changed.

    Args:
        model: Plain or adapted.
        saved: The adapter.
        shapes: Of the adapter tensors that the model has, or would have.
        contents: Of the model; of ``beside``, what must be in the file.
        origin: What messages call the adapter.

    Returns:
        The model's tensors that the file has something for beside the adapter.
    """
    first = saved.format_version == 1
    with _readable_base(origin):
        if first:
            check_first_base(saved.base, contents.linears, origin)
        else:
            check_layers(saved.base["layers"], describe_layers(contents.linears), origin)
    state = base_state(model)
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, tensor in own.items():
        check_not_emptied(name, tensor)
    names = [name for name in saved.tensors if not is_adapter_tensor(name)]
    missing = sorted((shapes.keys() | contents.beside.keys()) - saved.tensors.keys())
    extra = sorted(saved.tensors.keys() - shapes.keys() - own.keys())
    if missing or extra:
        raise AdapterError(
            f"{origin} does not hold this model's tensors: missing {missing or 'none'}, "
            f"not in the model {extra or 'none'}"
        )
    beside = {name: own[name] for name in names}
    for name, tensor in sorted(saved.tensors.items()):
        expected = shapes[name] if name in shapes else list(own[name].shape)
        if list(tensor.shape) != expected:
            raise AdapterError(
                f"{origin}: {name} must have shape {expected}, got {list(tensor.shape)}"
                f"{_resizing(model, own.get(name), tensor)}"
            )
    if not first:
        with _readable_base(origin):
            check_values(saved.base, base_without(state, beside), contents.linears, origin)
    return beside


def _resizing(model: nn.Module, own: Tensor | None, saved: Tensor) -> str:
    """Say how to make room where an embedding or a head was trained with added tokens."""
    if own is None or own.shape[1:] != saved.shape[1:]:
        return ""
    getters = ("get_input_embeddings", "get_output_embeddings")
    layers: list[Any] = [getattr(model, name, lambda: None)() for name in getters]
    if not any(own is layer._parameters.get("weight") for layer in layers if layer is not None):
        return ""
    return f"; tokens were added: call model.resize_token_embeddings({len(saved)}) first"


@contextmanager
def _readable_base(origin: str) -> Iterator[None]:
    """Turn the errors of a malformed description of a base model into an AdapterError."""
    try:
        yield
    except AdapterError:
        raise
    except _MALFORMED as error:
        raise AdapterError(
            f"{origin} describes its base model in a way that cannot be read "
            f"({type(error).__name__}: {error}); save it again"
        ) from error


@contextmanager
def _added(
    model: nn.Module, config: ProdialConfig, adapter: str | None, origin: str
) -> Iterator[None]:
    """Add an adapter to a plain or an adapted model, and remove it if the block raises."""
    first = not adapted_layers(model) and STATE not in vars(model)
    name = "default" if adapter is None else adapter
    try:
        if first:
            apply_prodial(model, config, name)
        else:
            add_adapter(model, name, config)
    except ValueError as error:
        raise AdapterError(f"{origin} does not fit this model: {error}") from error
    try:
        yield
    except BaseException:
        if first:
            remove_prodial(model)
        else:
            delete_adapter(model, name)
        raise


@contextmanager
def _reading(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Let the layers of ``model`` show this adapter's tensors, or the active one's for None."""
    if adapter is None:
        yield
        return
    with reading_adapter(model, adapter):
        yield


def _adapters_of(model: nn.Module) -> dict[str, ProdialConfig]:
    try:
        return list_adapters(model)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _config_of(model: nn.Module, adapter: str | None = None) -> ProdialConfig:
    try:
        return get_prodial_config(model, adapter)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _check_none_replaced(model: nn.Module, config: ProdialConfig) -> None:
    """Raise AdapterError where a layer that ``config`` targets is plain: no load would take that.

    Such as a head that ``set_output_embeddings`` has put in the place of an adapted one.
    """
    inside = {f"{path}.base_layer" for path in adapted_layers(model)}
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Linear | QuantizedLinear) and path not in inside
        if plain and config.target_of(plain_path(path)) is not None:
            raise AdapterError(
                f"{path} has no adapter, though the configuration targets it: it was put in after "
                "the adapter; change the model first, and call apply_prodial after that"
            )


def _check_shared(beside: Mapping[str, Tensor], saved: SavedAdapter, origin: str) -> None:
    """Raise AdapterError where a load would change what the model's other adapters run on."""
    for name, own in beside.items():
        stored = saved.tensors[name].to(device=own.device, dtype=own.dtype)
        if not torch.equal(stored, own):
            raise AdapterError(
                f"{origin} holds {name}, which was trained beside it and is not what this model "
                "holds: the model's other adapters would run on it too. Load it into a model of "
                "its own, or use PEFT's method (prodial_kernels.peft), which keeps a copy for each"
            )


def _check_same_config(current: ProdialConfig, saved: ProdialConfig, origin: str) -> None:
    ours, theirs = current.to_dict(), replace(saved, impl=current.impl).to_dict()
    different = [
        f"{key}={theirs.get(key)!r} (the model has {ours.get(key)!r})"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]
    if different:
        raise AdapterError(
            f"{origin} has another configuration than the model's: {', '.join(different)}; call "
            "remove_prodial(model) first, then load_adapter applies the saved one"
        )


def _check_values(tensors: Mapping[str, Tensor], subject: str, advice: str) -> None:
    """Raise AdapterError for NaN or inf; a buffer beside the adapter may hold inf, as masks do."""
    for name, tensor in tensors.items():
        if all_finite(tensor):
            continue
        trained = is_adapter_tensor(name) or isinstance(tensor, nn.Parameter)
        if trained or tensor.float().isnan().any():
            raise AdapterError(f"{subject}: {name} holds NaN or inf. {advice}")


def _dictionary(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content[key]
    if not isinstance(value, dict):
        raise TypeError(f"{key} must be an object, got {type(value).__name__}")
    return value


def _printable(content: Mapping[str, Any], key: str) -> str | None:
    """A name that may be shown on a terminal: no escape sequences."""
    value = content[key]
    if value is not None and not (isinstance(value, str) and value.isprintable() and value):
        raise TypeError(f"{key} must be null or a name in printable letters, got {value!r}")
    return value


def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], origin: str) -> None:
    """Copy every source to the target of its name and shape, after checking all of them."""
    ready: dict[str, Tensor] = {}
    for name, target in targets.items():
        source = sources[name]
        # A head may be cast with the model it belongs to; a master must not lose resolution.
        floating = source.dtype in _FLOATING and target.dtype in _FLOATING
        wider = floating and torch.promote_types(source.dtype, target.dtype) != target.dtype
        master = is_adapter_tensor(name)
        if source.dtype != target.dtype and (not floating or (master and wider)):
            raise AdapterError(
                f"{origin}: {name} must have dtype {target.dtype} or narrower, got "
                f"{source.dtype}; convert the model with .to({source.dtype}) first"
            )
        # Moved before the first change: if memory runs out, it does so here.
        ready[name] = source.to(device=target.device, dtype=target.dtype)
    for name, target in targets.items():
        fill(target, ready[name])


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor's shape and dtype, as JSON files beside tensor files list them."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
