"""Converting between this package's adapter directories and PEFT's, without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prodial_kernels.checkpoint import AdapterError, SavedAdapter, read_adapter
from prodial_kernels.checkpoint.contents import is_adapter_tensor
from prodial_kernels.config import AdapterOptions, ProdialConfig
from prodial_kernels.models.adapt.inject import apply_prodial, remove_prodial
from prodial_kernels.models.adapt.named_layer import PARTS
from prodial_kernels.models.adapt.names import adapter_parameters
from prodial_kernels.models.adapt.report import AdapterReport
from prodial_kernels.models.diagnosis.doctor import ADAPTED, diagnose
from prodial_kernels.module_patterns import is_plain_name
from prodial_kernels.peft.config import ProdialPeftConfig

_PEFTS = "base_model.model."
_TENSORS = "adapter_model.safetensors"
_LORA_PARTS = {"prodial_a": "lora_A", "prodial_b": "lora_B"}
# Layers of Mamba's mixers whose weights some path reads instead of calling them.
_READ_BY_MIXERS = ("out_proj", "x_proj", "dt_proj")
_PLAIN_LORA = ("use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters")


def to_peft(
    directory: str | PathLike[str],
    output: str | PathLike[str],
    *,
    method: str = "prodial",
    model: nn.Module | None = None,
) -> None:
    """Write what ``save_adapter`` or ``prodial finetune`` wrote as PEFT's two files.

    Args:
        directory: An adapter of this package, of any format version.
        output: A directory that does not exist or is empty.
        method: ``"prodial"``, which is loaded with ``import prodial_kernels.peft``, or ``"lora"``,
            which PEFT loads by itself: adapters without s and D_b only, and none on layers where
            PEFT's LoRA is refused or has no effect until it is merged.
        model: The base model, plain, for ``"lora"``: says which layers those are
            (:func:`prodial_kernels.models.diagnosis.doctor.diagnose`). It may be on the ``meta``
            device. Default: all that are called ``out_proj``, ``x_proj`` or ``dt_proj``.

    Raises:
        AdapterError: There is no adapter, it is damaged, or its form is not that of ``method``.
        ValueError: ``output`` holds something, or an unknown method.
    """
    if method not in ("prodial", "lora"):
        raise ValueError(f'method must be "prodial" or "lora", got {method!r}')
    output = Path(output)
    check_output(output)
    saved = read_adapter(directory)
    beside = sorted(name for name in saved.tensors if not is_adapter_tensor(name))
    if beside:
        raise AdapterError(
            f"the adapter in {directory} holds tensors beside its layers ({', '.join(beside[:3])}, "
            "...), which are not converted"
        )
    if saved.config.methods:
        raise AdapterError(
            f"the adapter in {directory} is of the methods "
            f"{', '.join(method.name for method in saved.config.methods)}, which PEFT has no place "
            "for; merge it, or train it without"
        )
    if saved.config.train_ssm:
        raise AdapterError(
            f"the adapter in {directory} has offsets of state-space parameters (train_ssm), which "
            "PEFT has no place for; merge it, or train it without"
        )
    parts = PARTS if method == "prodial" else _LORA_PARTS
    config = _prodial(saved) if method == "prodial" else _lora(saved, directory, model)
    tensors = {}
    for name, tensor in saved.tensors.items():
        path, _, part = name.rpartition(".")
        tensors[f"{_PEFTS}{path}.{parts[part]}.weight"] = tensor.contiguous()
    config.base_model_name_or_path = saved.base_model
    config.inference_mode = True
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / _TENSORS, metadata={"format": "pt"})
    # The configuration last: without it there is no adapter for anybody.
    config.save_pretrained(str(output))


def check_output(output: Path) -> None:
    """Raise ValueError unless ``output`` does not exist or is an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty directory; choose another output")


def load_peft(model: nn.Module, directory: str | PathLike[str]) -> AdapterReport:
    """Adapt a plain model by ``apply_prodial`` with what PEFT wrote: ProDiaL, or plain LoRA.

    LoRA's function is kept where PEFT's has an effect; ``save_adapter`` then writes it as this
    package's own.

    Args:
        model: The base model of the adapter; PEFT's files do not say whether it is.
        directory: On this machine.

    Returns:
        What is trained now; prints as a table.

    Raises:
        AdapterError: No such adapter, other layers or shapes, values that are not finite, or
            options that one ``ProdialConfig`` does not express (other ranks in some layers, DoRA).
        ValueError: ``apply_prodial`` refuses the model.
    """
    directory = Path(directory)
    try:
        config: Any = PeftConfig.from_pretrained(str(directory))
        stored = load_file(directory / _TENSORS)
    except (OSError, KeyError, ValueError) as error:
        raise AdapterError(f"{directory} holds no adapter that PEFT can read: {error}") from error
    own, parts = _own_config(config, directory)
    names = {theirs: ours for ours, theirs in parts.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        path, _, part = name.removeprefix(_PEFTS).removesuffix(".weight").rpartition(".")
        if part not in names:
            raise AdapterError(f"{directory} holds {name}, which is no part of a layer's adapter")
        tensors[f"{path}.{names[part]}"] = tensor
    report = apply_prodial(model, own)
    try:
        _fill(adapter_parameters(model), tensors, directory)
    except BaseException:
        remove_prodial(model)
        raise
    return report


def _prodial(saved: SavedAdapter) -> ProdialPeftConfig:
    names = saved.config.target_modules
    plain = isinstance(names, str) and is_plain_name(names)
    options = {"target_modules": [names]} if plain else {}
    return ProdialPeftConfig.from_prodial(saved.config, **options)


def _lora(saved: SavedAdapter, directory: object, model: nn.Module | None) -> LoraConfig:
    config = saved.config
    if config.train_scale or config.train_diagonal or not config.r:
        raise AdapterError(
            f"the adapter in {directory} has s or D_b, which LoRA has not; give "
            "method='prodial' (prodial convert --to peft)"
        )
    paths = sorted({name.rpartition(".")[0] for name in saved.tensors})
    dead = [(path, "") for path in paths if path.endswith(_READ_BY_MIXERS)]
    if model is not None:
        dead = [
            (finding.module or finding.target, f" ({finding.why})")
            for finding in diagnose(model, paths).findings
            if finding.status != ADAPTED
        ]
    for path, why in dead:
        raise AdapterError(
            f"PEFT's LoRA on {path} would be refused or without effect before it is merged{why}; "
            "give method='prodial' (prodial convert --to peft)"
        )
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=paths,
    )


def _own_config(config: Any, directory: Path) -> tuple[ProdialConfig, Mapping[str, str]]:
    """Return the configuration for ``apply_prodial``, and the name of each part in the file."""
    lora = type(config) is LoraConfig
    if not lora and not isinstance(config, ProdialPeftConfig):
        raise AdapterError(f"{directory} holds PEFT's {config.peft_type}, not ProDiaL or LoRA")
    unlike = [name for name in _PLAIN_LORA if getattr(config, name, None)]
    unlike += [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    unlike += [name for name in ("modules_to_save", "lora") if getattr(config, name, None)]
    unlike += ["bias"] if getattr(config, "bias", "none") != "none" else []
    if unlike:
        raise AdapterError(f"{directory} has {', '.join(unlike)}, which is not converted")
    if config.exclude_modules or config.layers_to_transform is not None:
        raise AdapterError(
            f"{directory} leaves out layers by exclude_modules or layers_to_transform, which is "
            "not converted"
        )
    targets = config.target_modules
    names = targets if isinstance(targets, str) else tuple(sorted(targets or ()))
    if lora:
        alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
        return ProdialConfig(
            r=config.r, lora_alpha=alpha, lora_dropout=config.lora_dropout, train_scale=False,
            train_diagonal=False, target_modules=names, allow_partial=True,
        ), _LORA_PARTS  # fmt: skip
    shared = {field.name: getattr(config, field.name) for field in fields(AdapterOptions)}
    return ProdialConfig(
        n_blocks=config.n_blocks, block_size=config.block_size, target_modules=names,
        allow_partial=True, **shared,
    ), PARTS  # fmt: skip


@torch.no_grad()
def _fill(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], directory: Path
) -> None:
    """Copy every tensor to the parameter of its name, after checking all of them."""
    different = sorted(parameters.keys() ^ tensors.keys())
    if different:
        raise AdapterError(
            f"{directory} does not fit this model's layers: {', '.join(different[:4])} is only in "
            "one of the two"
        )
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise AdapterError(
                f"{directory}: {name} must have shape {list(parameters[name].shape)}, got "
                f"{list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"{directory}: {name} has values that are not finite")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
