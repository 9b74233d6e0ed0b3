"""A base model with a saved adapter: loaded to use, or merged into a directory."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import torch

from prodial_kernels.checkpoint import load_adapter, read_adapter
from prodial_kernels.mixers.inject import merge_prodial
from prodial_kernels.training.merging import (
    Agreement,
    check_written_model,
    logits_of,
    write_model,
)
from prodial_kernels.training.model import (
    EMBEDDED,
    LoadedModel,
    ModelError,
    load_model,
    resolve_device,
    resolve_dtype,
)


def load_adapted(
    model: str | None = None,
    adapter: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> LoadedModel:
    """Load a model, and put a saved adapter into it.

    Args:
        model: As for :func:`load_model`. None: the base model that the adapter names; without an
            adapter, the embedded model.
        adapter: Directory of an adapter; None for the model alone.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        dtype: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        quantize: As for :func:`load_model`. An adapter belongs to the format it was trained on.

    Raises:
        AdapterError: The adapter is damaged, or does not belong to the model.
        ModelError: The model or the device cannot be used.
    """
    if model is None and adapter is not None:
        model = read_adapter(adapter).base_model
        if model is None:
            raise ModelError(f"the adapter in {adapter} names no base model; give it as the model")
    on = resolve_device(device)
    loaded = load_model(
        model or EMBEDDED, device=on, dtype=resolve_dtype(dtype, on), quantize=quantize
    )
    if adapter is not None:
        load_adapter(loaded.model, adapter)
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
) -> Agreement:
    """Fold an adapter into its base model and write a plain model in transformers' format.

    The written model is dense, also where the base is quantised. It is loaded again and compared
    with the adapted one.

    Args:
        model: As for :func:`load_adapted`.
        adapter: Directory of the adapter.
        output: Directory to write, whole or not at all.
        replace: Whether an existing ``output`` is replaced.
        device: As for :func:`load_adapted`.
        dtype: As for :func:`load_adapted`; also the dtype of the written weights.
        quantize: As for :func:`load_adapted`.

    Returns:
        How well merged and adapted model agree.

    Raises:
        AdapterError: The adapter is damaged, or does not belong to the model.
        FileExistsError: ``output`` exists and is not to be replaced.
        MergeError: The written model does not compute what the adapted one does.
        ModelError: The model or the device cannot be used.
        OSError: The disk is full, or the place cannot be written.
    """
    path = Path(output).expanduser()
    # Before the model is loaded, which may take minutes.
    if path.exists() and not replace:
        raise FileExistsError(errno.EEXIST, "already exists (--force replaces it)", str(path))
    loaded = load_adapted(model, adapter, device=device, dtype=dtype, quantize=quantize)
    first = next(loaded.model.parameters())
    tokens = _probe_tokens(loaded)
    expected = logits_of(loaded.model, tokens)
    merge_prodial(loaded.model)
    write_model(loaded.model, loaded.tokenizer, path, replace=replace)
    return check_written_model(path, tokens, expected, device=first.device, dtype=first.dtype)


def _probe_tokens(loaded: LoadedModel) -> torch.Tensor:
    """Draw tokens [4, 64] to compare models on: any will do, since both read the same."""
    generator = torch.Generator().manual_seed(0)
    size = min(len(loaded.tokenizer), loaded.model.get_input_embeddings().weight.shape[0])
    return torch.randint(0, size, (4, 64), generator=generator)
