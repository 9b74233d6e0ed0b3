"""A base model with a saved adapter: loaded to use, or merged into a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.checkpoint import load_adapter, read_adapter
from prodial_kernels.embedded import embedded_model_path
from prodial_kernels.files.written import PlaceError, check_place, clear_leftovers, own_files
from prodial_kernels.models.adapt.inject import merge_prodial, merge_quantized
from prodial_kernels.models.loading.load import (
    EMBEDDED,
    LoadedModel,
    ModelError,
    is_stored_quantized,
    load_model,
    model_directory,
    read_config,
    resolve_device,
    resolve_dtype,
)
from prodial_kernels.models.loading.stored_again import write_stored_again
from prodial_kernels.models.methods.planning import kept_methods
from prodial_kernels.quantization import FORMATS, QuantizationReport, QuantizedLinear
from prodial_kernels.quantization.convert import STORED
from prodial_kernels.quantization.modules.selection import stores_everything
from prodial_kernels.training.gguf import gguf_notes, rename_for_converter
from prodial_kernels.training.merging import (
    Agreement,
    check_written_model,
    compare_logits,
    logits_of,
    round_as_stored,
    write_model,
    written_directory,
)
from prodial_kernels.training.run.directory import run_around
from prodial_kernels.training.run.implementation import check_implementation, set_implementation
from prodial_kernels.training.run.signals import StopSignals


def load_adapted(
    model: str | None = None,
    adapter: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    quantize_modules: str | None = None,
    impl: str | None = None,
) -> LoadedModel:
    """Load a model, and put a saved adapter into it.

    Args:
        model: As for :func:`load_model`. None: the base model that the adapter names; without an
            adapter, the embedded model.
        adapter: Directory of an adapter; None for the model alone.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        dtype: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        quantize: As for :func:`load_model`. An adapter belongs to the format it was trained on,
            and has it recorded: None takes that, where the checkpoint is not stored so itself.
        quantize_modules: Likewise; ``"projectors"`` without an adapter that tells.
        impl: What the adapted projectors run by; None: what the adapter was trained with.

    Raises:
        AdapterError: The adapter is damaged, or does not belong to the model.
        ConfigError: ``impl`` cannot run on this machine.
        ModelError: The model or the device cannot be used.
    """
    kept: Sequence[str] = ()
    if adapter is not None:
        saved = read_adapter(adapter)
        model = saved.base_model if model is None else model
        if not isinstance(model, str) or not model.strip():
            raise ModelError(f"the adapter in {adapter} names no base model; give it as the model")
        if quantize is None and saved.base_format in FORMATS and not is_stored_quantized(model):
            quantize = saved.base_format
        if quantize_modules is None:
            quantize_modules = "all" if stores_everything(saved.base_stored) else None
        kept = saved.config.modules_to_save or ()
    on = resolve_device(device)
    to = resolve_dtype(dtype, on)
    check_implementation(impl or "auto", on, to)
    loaded = load_model(
        model or EMBEDDED, device=on, dtype=to, quantize=quantize,
        quantize_modules=quantize_modules or "projectors", keep_dense=kept,
    )  # fmt: skip
    if adapter is not None:
        load_adapter(loaded.model, adapter)
        if impl is not None:
            set_implementation(loaded.model, impl)
        loaded = replace(loaded, name=f"{loaded.name} with the adapter in {adapter}")
    return loaded


def merge_to_directory(
    model: str | None,
    adapter: str | Path,
    output: str | Path,
    *,
    replace: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    quantize_modules: str | None = None,
    target: str | None = None,
) -> Agreement:
    """Fold an adapter into its base model and write a plain model in transformers' format.

    The written model is dense, also where the base is quantised. Before it takes its place it is
    loaded again and compared with the adapted one.

    Args:
        model: As for :func:`load_adapted`.
        adapter: Directory of the adapter.
        output: Directory to write, whole or not at all.
        replace: Whether an empty directory, or a model that was written by this package and not
            changed since, is replaced at ``output``.
        device: As for :func:`load_adapted`.
        dtype: As for :func:`load_adapted`; also the dtype of the written weights. With ``"auto"``
            they are no wider than the checkpoint's.
        quantize: As for :func:`load_adapted`.
        quantize_modules: Likewise.
        target: ``"gguf"`` writes the names that llama.cpp's converter knows.

    Raises:
        AdapterError: The adapter is damaged, or does not belong to the model.
        FileExistsError: ``output`` exists and is not to be replaced.
        Interrupted: SIGTERM or the like; what was at ``output`` is still there.
        MergeError: The written model does not compute what the adapted one does. It is not kept,
            and what was at ``output`` is still there.
        ModelError: The model or the device cannot be used.
        ValueError: The adapter has a method that cannot be merged.
        PlaceError: At ``output`` is something else, or it is, holds or lies in the adapter, the
            base model or a run, or is or holds the working directory.
        OSError: The disk is full, or the place cannot be written.
    """
    path, loaded = _loaded_to_merge(
        model, adapter, output, replace=replace, device=device, dtype=dtype, quantize=quantize,
        quantize_modules=quantize_modules,
    )  # fmt: skip
    with StopSignals():
        first = next(loaded.model.parameters())
        tokens = _probe_tokens(loaded)
        expected = logits_of(loaded.model, tokens)
        device_of, dtype_of = first.device, first.dtype
        merge_prodial(loaded.model)
        rounded = round_as_stored(loaded, tokens, expected, dtype=dtype)
        rename = rename_for_converter if target == "gguf" else None
        with write_model(
            loaded.model, loaded.tokenizer, path, replace=replace, rename=rename
        ) as written:
            return check_written_model(
                written, tokens, expected, device=device_of, dtype=dtype_of, rounded=rounded
            )


@dataclass(frozen=True)
class StoredMerge:
    """What :func:`merge_stored` wrote.

    Attributes:
        report: What rounding each merged weight to its stored format lost.
        agreement: Of the written model with the adapted one; rounding is in it, and is no fault.
    """

    report: QuantizationReport
    agreement: Agreement


def merge_stored(
    model: str | None,
    adapter: str | Path,
    output: str | Path,
    *,
    replace: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> StoredMerge:
    """Fold an adapter into a quantised checkpoint, and write it in the same format and layout.

    A merged weight is rounded to the nearest codes; everything else, ``config.json`` included, is
    the checkpoint's own. What is written is loaded again and compared with what was rounded. The
    arguments and errors are those of :func:`merge_to_directory`, and:

    Raises:
        ValueError: The checkpoint is not quantised, not in safetensors, stores a layer in a way
            that is read and not made, or has no place for what was trained.
    """
    base = model or read_adapter(adapter).base_model
    if base is not None and not is_stored_quantized(base):
        raise ValueError(
            f"{base} is stored dense, and is merged to a dense model: leave `stored` out"
        )
    path, loaded = _loaded_to_merge(
        model, adapter, output, replace=replace, device=device, dtype=dtype
    )
    with StopSignals():
        tokens = _probe_tokens(loaded)
        expected = logits_of(loaded.model, tokens)
        first = next(loaded.model.parameters())
        device_of, dtype_of = first.device, first.dtype
        report = merge_quantized(loaded.model, STORED)
        merged = logits_of(loaded.model, tokens)
        changed = {
            name: layer
            for name, layer in loaded.model.named_modules()
            if isinstance(layer, QuantizedLinear) and name in report.errors
        }
        directory = model_directory(base or EMBEDDED)

        def save(place: Path) -> None:
            write_stored_again(loaded.model, changed, directory, place)

        with written_directory(path, save, replace=replace) as written:
            check_written_model(written, tokens, merged, device=device_of, dtype=dtype_of)
        return StoredMerge(report, compare_logits(merged, expected, dtype=dtype_of))


def notes_for_gguf(model: str | None, adapter: str | Path) -> list[str]:
    """Return what is to be known of a merged model as a GGUF file, before it is made.

    The arguments are those of :func:`merge_to_directory`.

    Raises:
        AdapterError: The adapter is damaged.
        GGUFError: llama.cpp's converter does not take the model.
        ModelError: The model's configuration cannot be read.
    """
    base = model or read_adapter(adapter).base_model
    if base is None:
        raise ModelError(f"the adapter in {adapter} names no base model; give it as the model")
    return gguf_notes(read_config(base))


def _loaded_to_merge(
    model: str | None, adapter: str | Path, output: str | Path, *, replace: bool, **options: Any
) -> tuple[Path, LoadedModel]:
    """Check where a merged model is to be written, and load the adapted one."""
    # Links are followed first: what they lead to is what would be replaced.
    path = Path(output).expanduser().resolve()
    unmerged = kept_methods(read_adapter(adapter).config.methods)
    if unmerged:
        raise ValueError(
            f"{', '.join(unmerged)} cannot be merged: its effect is no weight's, and a plain model "
            f"cannot have it; load the model with the adapter in {adapter} instead"
        )
    # Before the model is loaded, which may take minutes.
    _check_output(path, model, Path(adapter).expanduser(), replace=replace)
    with StopSignals():
        return path, load_adapted(model, adapter, **options)


def _check_output(path: Path, model: str | None, adapter: Path, *, replace: bool) -> None:
    """Raise unless a merged model may be written to ``path``."""
    base = model or read_adapter(adapter).base_model
    sources = {"the adapter": adapter}
    if base is not None:
        sources["the base model"] = (
            embedded_model_path() if base == EMBEDDED else Path(base).expanduser()
        )
    check_place(path, sources, around={"the working directory": Path.cwd()})
    clear_leftovers(path)
    there = os.path.lexists(path)
    run = run_around(path)
    if run is not None and (there or path.relative_to(run.path).parts[0] in run.own_names):
        raise PlaceError(f"{path} belongs to the run in {run.path}; choose another place")
    if there:
        own_files(path)
        if not replace:
            raise FileExistsError(
                errno.EEXIST, "already exists (replace=True replaces it)", str(path)
            )


def _probe_tokens(loaded: LoadedModel) -> torch.Tensor:
    """Draw tokens [4, 64] to compare models on: any will do, since both read the same."""
    generator = torch.Generator().manual_seed(0)
    size = min(len(loaded.tokenizer), loaded.model.get_input_embeddings().weight.shape[0])
    return torch.randint(0, size, (4, 64), generator=generator)
