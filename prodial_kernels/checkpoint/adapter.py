"""``save_adapter`` and ``load_adapter``: between an adapted model and a directory."""

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

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE, read_files, write_files
from prodial_kernels.checkpoint.fingerprint import check_base, describe_base
from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import ADAPTER_PARAMETERS, ProdialLinear
from prodial_kernels.mixers.inject import apply_prodial, get_prodial_config, remove_prodial
from prodial_kernels.mixers.report import AdapterReport, adapter_report
from prodial_kernels.mixers.targets import find_saved, find_targets, module_paths
from prodial_kernels.quantization import QuantizedLinear


@dataclass(frozen=True)
class SavedAdapter:
    """A directory's adapter, verified against its checksums.

    Attributes:
        config: The configuration it was trained with.
        tensors: By name, on the CPU: ``<module path>.prodial_*``, and the tensors of
            ``config.modules_to_save``.
        base: Fingerprint of the base model (:func:`describe_base`).
        base_model: Name of the base model as given to :func:`save_adapter`, or None.
        package_version: Version of this package that wrote it.
    """

    config: ProdialConfig
    tensors: dict[str, Tensor]
    base: Mapping[str, Any]
    base_model: str | None
    package_version: str


def save_adapter(
    model: nn.Module, directory: str | PathLike[str], *, base_model: str | None = None
) -> None:
    """Write the adapter of ``model``, and the modules trained beside it, to ``directory``.

    Two files: ``adapter_model.safetensors`` and ``adapter_config.json``. The directory always
    holds the previous adapter or this one, even if the process is killed. Tensors keep their
    dtype. Call it from one process only.

    Args:
        model: What ``apply_prodial`` or ``load_adapter`` was called on.
        directory: Created if it does not exist; an adapter already in it is replaced.
        base_model: Name or path of the base model, for people and the command line to find it by.
            Default: ``model.name_or_path`` where there is one, as in transformers.

    Raises:
        AdapterError: The model has no adapter, or its weights are on the meta device.
        OSError: The disk is full, or the place cannot be written.
    """
    from prodial_kernels import __version__

    config = _config_of(model)
    tensors = _adapter_tensors(model, config)
    base = describe_base(_base_layers(model))
    if base_model is None:
        own_name = getattr(model, "name_or_path", None)
        base_model = own_name if isinstance(own_name, str) and own_name else None
    header = {
        "package_version": __version__,
        "base_model": base_model,
        "config": config.to_dict(),
        "tensors": {name: _description(tensor) for name, tensor in tensors.items()},
        "base": base,
    }
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    owned = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    write_files(Path(directory), header, serialise_safetensors(owned))


def read_adapter(directory: str | PathLike[str]) -> SavedAdapter:
    """Read and verify the adapter in ``directory``, without a model.

    Raises:
        AdapterError: Something is missing, damaged, changed by hand, or of another version.
        OSError: A file exists but cannot be read.
    """
    directory = Path(directory)
    header, payload = read_files(directory)
    try:
        tensors = parse_safetensors(payload)
        config = ProdialConfig.from_dict(header["config"])
        listed: dict[str, Any] = header["tensors"]
        saved = SavedAdapter(
            config, tensors, header["base"], header["base_model"], header["package_version"]
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"the adapter in {directory} cannot be read although its checksums match "
            f"({type(error).__name__}: {error}); save it again"
        ) from error
    found = {name: _description(tensor) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | listed.keys()):
        if found.get(name) != listed.get(name):
            raise AdapterError(
                f"{directory / TENSOR_FILE} holds {name} as {found.get(name, 'missing')}, but "
                f"{CONFIG_FILE} lists it as {listed.get(name, 'missing')}; save it again"
            )
    return saved


def load_adapter(model: nn.Module, directory: str | PathLike[str]) -> AdapterReport:
    """Put the adapter in ``directory`` into ``model``, in place.

    A plain model gets the saved configuration by ``apply_prodial`` first; a model that is already
    adapted must have that configuration (``impl`` aside). Everything is checked before the first
    change, and on an error the model is as it was.

    The base may be in another floating-point dtype than the one the adapter was trained on. The
    adapter's tensors are never narrowed; those of ``modules_to_save`` take the model's dtype.

    Returns:
        What is trained now; prints as a table.

    Raises:
        AdapterError: The adapter is missing, damaged, of another version, or does not belong to
            this model: another base, other layers, other shapes, or another configuration.
        OSError: A file exists but cannot be read.
    """
    origin = f"the adapter in {directory}"
    saved = read_adapter(directory)
    if saved.base_model is not None:
        origin += f" (base model {saved.base_model!r})"
    adapted = [m for m in model.modules() if isinstance(m, ProdialLinear)]
    if adapted:
        _check_same_config(_config_of(model), saved.config, origin)
        if any(layer.merged for layer in adapted):
            raise AdapterError("the model's adapter is merged; call unmerge() on its layers first")
        check_base(saved.base, _base_layers(model), origin)
        _copy_into(_adapter_tensors(model, saved.config), saved.tensors, origin)
        return adapter_report(model)
    try:
        targets = find_targets(model, saved.config)
    except ValueError as error:
        raise AdapterError(f"{origin} does not fit this model: {error}") from error
    check_base(saved.base, {t.paths[0]: t.linear for t in targets}, origin)
    with _applied(model, saved.config, origin):
        _copy_into(_adapter_tensors(model, saved.config), saved.tensors, origin)
    return adapter_report(model)


@contextmanager
def _applied(model: nn.Module, config: ProdialConfig, origin: str) -> Iterator[None]:
    """Apply ``config``, and take it out again if the block raises."""
    try:
        apply_prodial(model, config)
    except ValueError as error:
        raise AdapterError(f"{origin} does not fit this model: {error}") from error
    try:
        yield
    except BaseException:
        remove_prodial(model)
        raise


def _config_of(model: nn.Module) -> ProdialConfig:
    try:
        return get_prodial_config(model)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _check_same_config(current: ProdialConfig, saved: ProdialConfig, origin: str) -> None:
    ours, theirs = current.to_dict(), replace(saved, impl=current.impl).to_dict()
    different = [
        f"{key}={theirs[key]!r} (the model has {ours[key]!r})"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if different:
        raise AdapterError(
            f"{origin} has another configuration than the model's: {', '.join(different)}; call "
            "remove_prodial(model) first, then load_adapter applies the saved one"
        )


def _base_layers(model: nn.Module) -> dict[str, nn.Linear | QuantizedLinear]:
    return {
        paths[0]: module.base_layer
        for module, paths in module_paths(model).items()
        if isinstance(module, ProdialLinear)
    }


def _adapter_tensors(model: nn.Module, config: ProdialConfig) -> dict[str, Tensor]:
    """Every tensor an adapter consists of, by its name in the file; they share the model's memory.

    Raises:
        AdapterError: A tensor is on the meta device, or a module's state is not made of tensors.
    """
    paths = module_paths(model)
    tensors: dict[str, Tensor] = {}
    for module, names in paths.items():
        if isinstance(module, ProdialLinear):
            for name, parameter in module.adapter_parameters():
                tensors[f"{names[0]}.{name}"] = parameter.detach()
    for module in find_saved(model, config, ()):
        for name, value in module.state_dict(prefix=f"{paths[module][0]}.").items():
            if not isinstance(value, Tensor):
                raise AdapterError(
                    f"modules_to_save: {name} is a {type(value).__name__}, and only tensors can "
                    "be saved; name the submodules that hold tensors instead"
                )
            tensors[name] = value
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise AdapterError(
                f"{name} is on the meta device and has no values; load the weights first"
            )
    return tensors


def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], origin: str) -> None:
    """Copy every source over the target of its name, after checking them all."""
    missing = sorted(targets.keys() - sources.keys())
    extra = sorted(sources.keys() - targets.keys())
    if missing or extra:
        raise AdapterError(
            f"{origin} does not hold this model's tensors: missing {missing or 'none'}, "
            f"not in the model {extra or 'none'}"
        )
    ready: dict[str, Tensor] = {}
    for name, target in targets.items():
        source = sources[name]
        if source.shape != target.shape:
            raise AdapterError(
                f"{origin}: {name} must have shape {list(target.shape)}, got {list(source.shape)}"
            )
        # A head may be cast with the model it belongs to; a master must not lose resolution.
        floating = source.is_floating_point() and target.is_floating_point()
        wider = torch.promote_types(source.dtype, target.dtype) != target.dtype
        master = name.rpartition(".")[2] in ADAPTER_PARAMETERS
        if source.dtype != target.dtype and (not floating or (master and wider)):
            raise AdapterError(
                f"{origin}: {name} must have dtype {target.dtype} or narrower, got "
                f"{source.dtype}; convert the model with .to({source.dtype}) first"
            )
        # Moved before the first change: if memory runs out, it does so here.
        ready[name] = source.to(device=target.device, dtype=target.dtype)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(ready[name])


def _description(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
