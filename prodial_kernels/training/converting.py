"""``prodial convert``: an adapter's directory in the form of this package or of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from prodial_kernels._checks import check_choice
from prodial_kernels.checkpoint import AdapterError, read_adapter, save_adapter
from prodial_kernels.checkpoint.files import CONFIG_FILE
from prodial_kernels.models.loading.load import (
    ModelError,
    empty_model,
    load_model,
    resolve_device,
    resolve_dtype,
)

FORMS = ("peft", "lora", "prodial")


def convert_adapter(
    adapter: str | Path, to: str, output: str | Path, *, model: str | None = None
) -> None:
    """Write the adapter in a directory once more, in another form; every number stays as it is.

    Args:
        adapter: Directory of an adapter: this package's, or for ``"prodial"`` one of PEFT's, with
            ProDiaL or plain LoRA.
        to: ``"peft"`` or ``"lora"``, see :func:`prodial_kernels.peft.to_peft`; or ``"prodial"``,
            which needs the base model: this package's adapters say which one they belong to.
        output: A directory that does not exist or is empty.
        model: As for :func:`load_model`; None: the one that the adapter names. ``"prodial"`` loads
            it; ``"lora"`` reads its configuration, where it is there, to refuse layers on which
            PEFT's LoRA would be dead and no others.

    Raises:
        AdapterError: The adapter is damaged, or has no such form.
        ImportError: PEFT is not installed.
        ModelError: The base model cannot be loaded, or is not named.
        ValueError: ``output`` holds something, or an unknown form.
    """
    from prodial_kernels.peft.convert import check_output, load_peft, to_peft

    check_choice("to", to, FORMS)
    if to != "prodial":
        base = _empty_base(adapter, model) if to == "lora" else None
        to_peft(adapter, output, method="prodial" if to == "peft" else to, model=base)
        return
    output = Path(output)
    check_output(output)
    name = _base_of(Path(adapter)) if model is None else model
    device = resolve_device("auto")
    loaded = load_model(name, device=device, dtype=resolve_dtype("auto", device))
    load_peft(loaded.model, adapter)
    save_adapter(loaded.model, output, base_model=name)


def _empty_base(adapter: str | Path, model: str | None) -> nn.Module | None:
    """Return the base model without its weights; None where it is neither given nor to be found."""
    name = read_adapter(adapter).base_model if model is None else model
    if name is None:
        return None
    try:
        return empty_model(name, dtype=torch.float32)
    except ModelError:
        if model is not None:
            raise
        return None


def _base_of(adapter: Path) -> str:
    try:
        content = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
        name = content["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{adapter} is no directory of PEFT's: {error!r}") from error
    if not isinstance(name, str) or not name:
        raise ModelError(f"the adapter in {adapter} names no base model; give it with model=...")
    return name
