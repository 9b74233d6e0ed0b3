"""A causal language model of transformers with quantised projectors, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prodial_kernels.models.loading.as_transformers import AsTransformers
from prodial_kernels.quantization import QuantizationReport, TensorFiles, load_quantized
from prodial_kernels.quantization.stored_config import check_stored_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_by_tensors(
    directory: Path,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    format: str | None,
) -> tuple[PreTrainedModel, QuantizationReport]:
    """Load a model whose projectors are stored in ``format``, or as the checkpoint stores them.

    Args:
        directory: A checkpoint.
        config: The model's; what it says of quantisation is taken out, because the weights say it.
        device: Where to put it.
        dtype: Of the dense weights.
        format: Of dense projectors; None leaves them dense.

    Raises:
        OSError: The checkpoint is not there or cannot be read.
        ValueError: It does not fit the configuration, or is quantised in an unknown format.
    """
    from transformers import GenerationConfig

    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        check_stored_config(stored if isinstance(stored, Mapping) else stored.to_dict())
        del config.quantization_config
    model = model_on_meta(config, dtype)
    tensors = AsTransformers(TensorFiles(directory), config, dtype)
    report = load_into(model, tensors, device, format, _renaming(model))
    model.name_or_path = model.config.name_or_path = str(directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, report


def model_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model of a configuration without storage for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    return model.eval()


def load_into(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    format: str | None,
    rename: Callable[[str], str] | None,
) -> QuantizationReport:
    """Fill a model of :func:`model_on_meta` from ``tensors``, quantised as they are read.

    The other arguments are those of :func:`~prodial_kernels.quantization.load_quantized`.
    """
    return load_quantized(
        model, tensors, format, device=device, rename=rename,
        ignore=model._keys_to_ignore_on_load_unexpected or (),
        fill=partial(_compute_buffers, model),
    )  # fmt: skip


def _compute_buffers(model: Any) -> None:
    """Compute rotary frequencies and the like, which checkpoints do not hold."""
    for tensor in model.state_dict(keep_vars=True).values():
        # transformers' sign that a tensor has its values already.
        tensor._is_hf_initialized = True
    model.apply(model._init_weights)


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """How transformers turns names of this model's checkpoints into its own."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    own = model.state_dict()

    def rename(name: str) -> str:
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if converted is not None:
            raise ValueError(
                f"{name} of this checkpoint is merged with others when it is loaded "
                f"({type(model).__name__}), which is not done while quantising; load this model "
                "without quantize"
            )
        return str(renamed)

    return rename
