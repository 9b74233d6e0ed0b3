"""A causal language model of transformers with quantised projectors, read tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prodial_kernels.models.loading.as_transformers import AsTransformers
from prodial_kernels.models.loading.whole_scales import WholeScales
from prodial_kernels.module_patterns import matches_name
from prodial_kernels.quantization import QuantizationReport, TensorFiles, load_quantized
from prodial_kernels.quantization.groups.checkpoints import GROUPED, GroupedLayers
from prodial_kernels.quantization.loading import Piece
from prodial_kernels.quantization.modules.selection import EVERYTHING, PROJECTORS
from prodial_kernels.quantization.stored_config import WHOLE_SCALES, check_stored_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def load_by_tensors(
    directory: Path,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    format: str | None,
    modules: str = "projectors",
    keep_dense: Sequence[str] = (),
    experts_on_host: bool = False,
) -> tuple[PreTrainedModel, QuantizationReport]:
    """Load a model whose weights are stored in ``format``, or as the checkpoint stores them.

    Args:
        directory: A checkpoint.
        config: The model's; what it says of quantisation is taken out, because the weights say it.
        device: Where to put it.
        dtype: Of the dense weights.
        format: Of the dense weights of ``modules``; None leaves them dense.
        modules: ``"projectors"`` or ``"all"``, as ``FinetuneConfig.quantize_modules``.
        keep_dense: Modules that are not quantised, because they are trained.
        experts_on_host: As :func:`~prodial_kernels.quantization.load_quantized` has it.

    Raises:
        OSError: The checkpoint is not there or cannot be read.
        ValueError: It does not fit the configuration, or is quantised in an unknown format.
    """
    from transformers import GenerationConfig

    stored = getattr(config, "quantization_config", None)
    files = TensorFiles(directory)
    read: TensorFiles | WholeScales | GroupedLayers = files
    if stored is not None:
        fields = stored if isinstance(stored, Mapping) else stored.to_dict()
        check_stored_config(fields)
        if fields.get("quant_method") in GROUPED:
            read = GroupedLayers(files, fields, dtype)
        if fields.get("quant_method") in WHOLE_SCALES:
            read = WholeScales(read, dtype)
        del config.quantization_config
    model = model_on_meta(config, dtype)
    tensors = AsTransformers(read, config, dtype)
    report = load_into(
        model, tensors, device, format, renaming(model), modules=modules, keep_dense=keep_dense,
        experts_on_host=experts_on_host,
    )  # fmt: skip
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
    rename: Callable[[str], str | Piece] | None,
    *,
    modules: str = "projectors",
    keep_dense: Sequence[str] = (),
    experts_on_host: bool = False,
) -> QuantizationReport:
    """Fill a model of :func:`model_on_meta` from ``tensors``, quantised as they are read.

    The other arguments are those of :func:`load_by_tensors` and of
    :func:`~prodial_kernels.quantization.load_quantized`.
    """
    everything = modules == EVERYTHING
    # Others are of parameters, which stay dense in any case.
    paths = [path for path, _ in model.named_modules()]
    kept = [name for name in keep_dense if any(matches_name(path, name) for path in paths)]
    return load_quantized(
        model, tensors, format, device=device, rename=rename,
        target_modules=EVERYTHING if everything else PROJECTORS,
        exclude=kept if everything else (), experts_on_host=experts_on_host,
        ignore=model._keys_to_ignore_on_load_unexpected or (),
        fill=partial(_compute_buffers, model),
    )  # fmt: skip


def _compute_buffers(model: Any) -> None:
    """Compute rotary frequencies and the like, which checkpoints do not hold."""
    for tensor in model.state_dict(keep_vars=True).values():
        # transformers' sign that a tensor has its values already.
        tensor._is_hf_initialized = True
    model.apply(model._init_weights)


def renaming(model: PreTrainedModel) -> Callable[[str], str | Piece]:
    """How transformers turns names of this model's checkpoints into its own.

    Experts that a checkpoint holds one by one, and gate and up apart, are parts of a tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    own = model.state_dict()

    def rename(name: str) -> str | Piece:
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if converted is None:
            return str(renamed)
        rule = next(rule for rule in converters if converted in rule.source_patterns)
        expert = _EXPERT.search(name)
        if expert is None or not _stacks_experts(rule):
            raise ValueError(
                f"{name} of this checkpoint is merged with others when it is loaded "
                f"({type(model).__name__}), in a way that is not known while quantising; load this "
                "model without quantize"
            )
        if renamed not in own:
            raise ValueError(
                f"{name} is of an expert that this checkpoint holds quantised, which is not read; "
                "use the dense checkpoint, with --quantize where it is too large"
            )
        order = rule.source_patterns.index(converted)
        return Piece(str(renamed), int(expert.group(1)), order, len(rule.source_patterns))

    return rename


def _stacks_experts(rule: Any) -> bool:
    """Whether a rule of transformers' puts experts in a row, each of one or more in its rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [type(operation) for operation in rule.operations]
    dims = [getattr(operation, "dim", None) for operation in rule.operations]
    if len(rule.source_patterns) == 1:
        return kinds == [MergeModulelist] and dims == [0]
    return kinds == [MergeModulelist, Concatenate] and dims == [0, 1]
