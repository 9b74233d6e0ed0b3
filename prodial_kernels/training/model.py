"""Where a run's model comes from: the embedded one, a directory, or the hub; device and dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prodial_kernels.quantization import QuantizationReport
from prodial_kernels.training.quantized import load_by_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"


class ModelError(RuntimeError):
    """A model cannot be loaded, or not on this device."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer.

    Attributes:
        name: What it was loaded by.
        model: The model, on its device, in eval mode.
        tokenizer: Its tokenizer.
        quantization: What was quantised, if anything.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quantization: QuantizationReport | None = None


def load_model(
    name: str, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> LoadedModel:
    """Load a causal language model through transformers.

    Args:
        name: ``"embedded"``, a directory as ``save_pretrained`` writes it, or a hub id. The
            checkpoint may be quantised in a format of :mod:`prodial_kernels.quantization`.
        device: Where to put it.
        dtype: Dtype of its weights, and what quantised ones are computed in.
        quantize: Format to store ``in_proj`` and ``out_proj`` in. They are read one at a time, so
            that the model is never dense as a whole.

    Raises:
        ModelError: There is no such model, or it cannot be read; the message says what to do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model: Any
    report = None
    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source)
        # It shapes initial values only, but transformers 5.23 applies it to loaded weights too and
        # so divides a trained out_proj by sqrt(num_hidden_layers), at every load again.
        if getattr(config, "rescale_prenorm_residual", False):
            config.rescale_prenorm_residual = False
        tokenizer = AutoTokenizer.from_pretrained(source)
        if quantize is not None or hasattr(config, "quantization_config"):
            model, report = load_by_tensors(source, config, device, dtype, quantize)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    # Each layer below raises classes of its own for a missing, damaged or unknown model.
    except Exception as error:
        raise ModelError(_explain(name, source, error)) from error
    return LoadedModel(name, model.to(device).eval(), tokenizer, report)


def empty_model(name: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that :func:`load_model` would load, on the ``meta`` device: shapes only.

    Args:
        name: As for :func:`load_model`.
        dtype: Dtype of its weights.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise ModelError(_explain(name, source, error)) from error
    made: PreTrainedModel = model.requires_grad_(False)
    return made


def resolve_device(name: str) -> torch.device:
    """Return the device for ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ModelError: CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ModelError("device 'cuda' was asked for, but PyTorch finds no CUDA device; use 'cpu'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for ``"auto"``, ``"float32"`` or ``"bfloat16"``."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _source(name: str) -> Path | str:
    """Return a directory that holds a model, or a hub id."""
    if name == EMBEDDED:
        from prodial_kernels.embedded import embedded_model_path

        return embedded_model_path()
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{path} holds an adapter, not a model; give its base model as the model, and this "
                "directory as the adapter"
            )
        raise ModelError(f"{path} holds no model: there is no config.json in it")
    if path.exists():
        raise ModelError(f"{path} is a file; give the directory that holds the model")
    inside_a_directory_here = path.parent != Path(".") and path.parent.is_dir()
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or inside_a_directory_here:
        raise ModelError(f"{name}: no such directory (looked in {Path.cwd()})")
    return name


def _explain(name: str, source: Path | str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(source, Path):
        return f"cannot load the model in {source}: {reason}"
    return (
        f"cannot load model {name!r}: there is no such directory here, and the hub did not give "
        f"it ({reason}). Check the name and the network, or give a local directory; "
        f"'{EMBEDDED}' always works offline"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
