"""A run's model, loaded whole or refused; device and dtype."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prodial_kernels.models.loading.as_transformers import (
    is_named_as_mamba_ssm,
    read_configuration,
    read_tokenizer,
    rescaled,
)
from prodial_kernels.models.loading.completeness import (
    check_dense,
    check_merged,
    check_numbers,
    check_tokenizer,
    check_whole,
    dtypes_of_dense,
)
from prodial_kernels.models.loading.quantized import load_by_tensors, model_on_meta
from prodial_kernels.models.loading.source import (
    EMBEDDED,
    ModelError,
    fetched,
    model_source,
    without_retries,
)
from prodial_kernels.quantization import QuantizationReport, TensorFiles
from prodial_kernels.quantization.saving import RESCALING
from prodial_kernels.upstream import require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What loading calls by this name is meant for users of this module too.
__all__ = [
    "EMBEDDED",
    "LoadedModel",
    "ModelError",
    "empty_model",
    "is_stored_quantized",
    "load_model",
    "read_config",
    "resolve_device",
    "resolve_dtype",
]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer.

    Attributes:
        name: What it was loaded by.
        model: The model, on its device, in eval mode.
        tokenizer: Its tokenizer.
        quantization: What was quantised, if anything.
        stored_dtype: What most of the checkpoint's dense weights are stored in, if that is known.
        stored_wider: The checkpoint's names of those that are stored in a wider one.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quantization: QuantizationReport | None = None
    stored_dtype: torch.dtype | None = None
    stored_wider: frozenset[str] = frozenset()


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    quantize_modules: str = "projectors",
    keep_dense: Sequence[str] = (),
    experts_on_host: bool = False,
) -> LoadedModel:
    """Load a causal language model through transformers.

    Args:
        name: ``"embedded"``, a directory as ``save_pretrained`` of transformers or mamba_ssm writes
            it, or a hub id. The checkpoint may be quantised in a format of
            :mod:`prodial_kernels.quantization`.
        device: Where to put it.
        dtype: Dtype of its weights, and what quantised ones are computed in.
        quantize: Format to store frozen weights in. They are read one at a time, so that the model
            is never dense as a whole.
        quantize_modules: Which: ``"projectors"`` (``in_proj`` and ``out_proj``) or ``"all"``, as
            :func:`prodial_kernels.quantize_model` has it.
        keep_dense: Modules that are not quantised, because they are trained.
        experts_on_host: Whether a mixture's quantised experts stay in the host's memory.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: There is no such model, or it cannot be read; the message says what to do.
    """
    require_extra("loading a model", ("transformers",))

    model: Any
    report = None
    source = model_source(name)
    try:
        with without_retries(source) as options:
            config: Any = read_configuration(source, **options)
            try:
                tokenizer, own = read_tokenizer(source, config, **options)
            except Exception as error:
                raise ValueError(
                    f"its tokenizer cannot be read ({type(error).__name__}: {_first_line(error)}); "
                    "save it there with tokenizer.save_pretrained, which writes tokenizer.json"
                ) from error
            directory = source if isinstance(source, Path) else fetched(source, **options)
        if own:
            check_tokenizer(tokenizer, directory)
        tensors = TensorFiles(directory)
        stored, wider = dtypes_of_dense(tensors)
        _warn_of_rescaling(name, config)
        packed = quantize is not None or hasattr(config, "quantization_config")
        if packed or is_named_as_mamba_ssm(tensors):
            model, report = load_by_tensors(
                directory, config, device, dtype, quantize, quantize_modules, keep_dense,
                experts_on_host,
            )  # fmt: skip
            report = report if packed else None
        else:
            model = _load_dense(directory, config, dtype)
    # Each layer below raises classes of its own for a missing, damaged or unknown model.
    except Exception as error:
        raise ModelError(_explain(name, source, error)) from error
    _take_end_tokens(model, tokenizer)
    if getattr(config, RESCALING, False):
        # It is done, and must not be again when what is made of this model is loaded.
        setattr(model.config, RESCALING, False)
    if not isinstance(source, Path):
        # By which an adapter names its base; the directory is in a cache.
        model.name_or_path = model.config.name_or_path = source
    return LoadedModel(name, model.to(device).eval(), tokenizer, report, stored, wider)


def _load_dense(directory: Path, config: Any, dtype: torch.dtype) -> Any:
    """Load a checkpoint that is not quantised, all of it."""
    from transformers import AutoModelForCausalLM

    tensors = TensorFiles(directory)
    check_dense(tensors)
    model: Any
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, trust_remote_code=False,
            # Else transformers raises an error that names no tensor.
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except RuntimeError as error:
        check_merged(error)
        raise
    state = model.state_dict()
    check_whole(info, state.keys(), getattr(config, "num_hidden_layers", None))
    check_numbers(tensors, state)
    return model


def _warn_of_rescaling(name: str, config: Any) -> None:
    """Say that transformers changes the weights of this checkpoint whenever it loads them."""
    if rescaled(config):
        warnings.warn(
            f"config.json of {name} sets {RESCALING}, so that transformers divides every out_proj "
            "by the root of the number of layers whenever it loads the model; the model is used as "
            "it is then",
            stacklevel=3,
        )


def _take_end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model whose configuration names no special token have its tokenizer's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for settings in (model.config, model.generation_config):
        if settings is not None and all(getattr(settings, name, None) is None for name in names):
            for name in names:
                setattr(settings, name, getattr(tokenizer, name))


def model_directory(name: str) -> Path:
    """Return where the files are of the model that :func:`load_model` loads, fetched if need be."""
    source = model_source(name)
    if isinstance(source, Path):
        return source
    with without_retries(source) as options:
        return fetched(source, **options)


def is_stored_quantized(name: str) -> bool:
    """Whether the checkpoint that :func:`load_model` would load says that it is quantised.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
    """
    return hasattr(read_config(name), "quantization_config")


def empty_model(name: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that :func:`load_model` would load, on the ``meta`` device: shapes only.

    ModelError where there is no such model, or its configuration cannot be read.
    """
    config = read_config(name)
    try:
        return model_on_meta(config, dtype).requires_grad_(False)
    except Exception as error:
        raise ModelError(_explain(name, model_source(name), error)) from error


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; ModelError where there is no CUDA."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ModelError("device 'cuda' was asked for, but PyTorch finds no CUDA device; use 'cpu'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for ``"auto"``, ``"float32"`` or ``"bfloat16"``."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def read_config(name: str) -> Any:
    """Return the configuration of the model that :func:`load_model` would load.

    ModelError where there is no such model, or its configuration cannot be read.
    """
    source = model_source(name)
    try:
        with without_retries(source) as options:
            return read_configuration(source, **options)
    except Exception as error:
        raise ModelError(_explain(name, source, error)) from error


def _explain(name: str, source: Path | str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(source, Path):
        if damaged := _damaged_files(source):
            return (
                f"cannot load the model in {source}: {', '.join(damaged)} is cut off or damaged "
                f"({reason}); fetch or copy it again"
            )
        stored = _stored_quantization(source)
        if not isinstance(stored, dict):
            reason = (
                "quantization_config in its config.json must be an object of fields, got "
                f"{stored!r:.60}; leave it out if the weights are dense"
            )
        return f"cannot load the model in {source}: {reason}"
    return (
        f"cannot load model {name!r}: there is no such directory here, and the hub did not give "
        f"it ({reason}). Check the name and the network, or give a local directory; "
        f"'{EMBEDDED}' always works offline"
    )


def _stored_quantization(directory: Path) -> Any:
    """What ``config.json`` says of a quantisation; an empty object where nothing can be read."""
    try:
        return json.loads((directory / "config.json").read_bytes()).get("quantization_config", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _damaged_files(directory: Path) -> list[str]:
    """Names of the tensor files whose header does not fit what is there."""
    from safetensors import SafetensorError, safe_open

    damaged = []
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            damaged.append(file.name)
    return damaged


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
