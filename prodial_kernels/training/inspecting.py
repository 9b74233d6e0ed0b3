"""What an adapter on disk holds and how far it has moved; what one would train in a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels._checks import check_choice, printable
from prodial_kernels.checkpoint import AdapterError, SavedAdapter, read_adapter
from prodial_kernels.checkpoint.files import CONFIG_FILE
from prodial_kernels.config import PLACEMENTS, ProdialConfig
from prodial_kernels.files.json_values import JsonReport
from prodial_kernels.linear import ADAPTER_PARAMETERS, ADDED, BESIDE, OFFSET
from prodial_kernels.models.adapt.inject import apply_prodial, get_prodial_config
from prodial_kernels.models.adapt.report import AdapterReport, table_lines
from prodial_kernels.models.diagnosis.doctor import Diagnosis, diagnose
from prodial_kernels.models.diagnosis.published import TOOLKITS, published_for
from prodial_kernels.models.loading.load import empty_model
from prodial_kernels.models.placements import resolve_placements
from prodial_kernels.ops.diagonal import deviation
from prodial_kernels.training.config import ConfigError, FinetuneConfig
from prodial_kernels.training.method import adapter_for
from prodial_kernels.training.results import two_columns


@dataclass(frozen=True)
class LayerStatistics:
    """How far one layer's adapter is from doing nothing. A part that it lacks is None.

    Attributes:
        module: Dotted path of the layer.
        trainable: Parameters of its adapter.
        n_blocks: Diagonal blocks.
        block_size: Side of a block.
        diagonal_mean: Mean of |D_b − I| over the blocks' entries.
        diagonal_max: Largest |D_b − I|.
        scale_mean: Mean of |s − 1|.
        scale_max: Largest |s − 1|.
        r: Rank of the LoRA part.
        lora_norm: Frobenius norm of α B A.
    """

    module: str
    trainable: int
    n_blocks: int | None
    block_size: int | None
    diagonal_mean: float | None
    diagonal_max: float | None
    scale_mean: float | None
    scale_max: float | None
    r: int | None
    lora_norm: float | None


@dataclass(frozen=True)
class AdapterInspection(JsonReport):
    """A saved adapter. ``str()`` is a table.

    Attributes:
        path: Its directory.
        base_model: Name of its base model, if it has one.
        package_version: The version that wrote it.
        config: Its configuration.
        layers: One entry for each adapted layer.
        trainable: Parameters in all, with modules trained as a whole.
        offsets: For each tensor that is trained beside the layers' adapters, by its dotted path,
            the mean and the largest size; of a parameter's offset, by the parameter's path.
    """

    path: str
    base_model: str | None
    package_version: str
    config: Mapping[str, Any]
    layers: Sequence[LayerStatistics]
    trainable: int
    offsets: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        config = ProdialConfig.from_dict(self.config)
        settings = ", ".join(
            f"{name}={value!r}" for name, value in self.config.items() if name != "methods"
        )
        writer = f"written by prodial-kernels {self.package_version}"
        head = two_columns(
            [
                ("adapter", printable(f"{self.path} ({writer})")),
                ("base model", printable(str(self.base_model or "not named"))),
                *([("configuration", settings)] if config.target_modules else []),
                *[("method", str(method)) for method in config.methods],
                ("parameters", f"{self.trainable:,}"),
            ]
        )
        columns = (
            "module", "parameters", "blocks", "|D_b-I| mean", "max",
            "|s-1| mean", "max", "r", "norm of aBA",
        )  # fmt: skip
        lines = [head]
        if self.layers or not config.methods:
            lines += ["", *table_lines([columns, *map(_cells, self.layers)])]
        if self.offsets:
            rows = [
                (printable(path), f"{mean:.2e}", f"{most:.2e}")
                for path, (mean, most) in self.offsets.items()
            ]
            lines += ["", *table_lines([("trained beside", "mean size", "max"), *rows])]
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckedTargets(JsonReport):
    """One list of targets, and what it would do in a model.

    Attributes:
        origin: Whose list it is, and where it is written.
        targets: The list, as one writes it.
        diagnosis: What each target would do.
    """

    origin: str
    targets: str
    diagnosis: Diagnosis

    def __str__(self) -> str:
        method = {"lora": "PEFT's LoRA", "prodial": "ProDiaL"}[self.diagnosis.method]
        refused = ": raises, and adapts nothing" if self.diagnosis.refused else ""
        head = [("targets", self.targets), ("from", self.origin), ("method", method + refused)]
        return f"{two_columns(head)}\n{self.diagnosis}"


@dataclass(frozen=True)
class ModelInspection(JsonReport):
    """What adapters would do in a model. ``str()`` is a table.

    Attributes:
        model: What the model was found by.
        config: The configuration of an adapter of this package; None where one was not asked for.
        report: What it would train; None where there is no ``config`` or it is refused.
        refused: Why it is refused; None where it is not.
        checked: What other lists of targets would do, one by one.
        notes: What else follows for an adapter of this package, a sentence each.
        unlisted: Toolkits that were asked for and publish no list for this kind of model.
    """

    model: str
    config: Mapping[str, Any] | None
    report: AdapterReport | None
    refused: str | None
    checked: Sequence[CheckedTargets]
    unlisted: Sequence[str]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        head = [("model", self.model)]
        if self.config is not None:
            config = self.config
            if not config["target_modules"]:
                config = {"methods": config.get("methods")}
            settings = ", ".join(f"{name}={value!r}" for name, value in config.items())
            head.append(("adapter", settings))
        if self.refused is not None:
            head.append(("refused", self.refused))
        if self.unlisted:
            head.append(("no list of", ", ".join(self.unlisted)))
        parts = [two_columns(head)]
        if self.report is not None:
            parts.append("\n".join([str(self.report), *(f"* {note}" for note in self.notes)]))
        return "\n\n".join([*parts, *map(str, self.checked)])


def is_adapter(path: str | Path) -> bool:
    """Whether a path is meant as an adapter rather than as a model."""
    folder = Path(path)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def inspect_adapter(path: str | Path) -> AdapterInspection:
    """Read and verify an adapter, without its model; AdapterError if it is missing or damaged."""
    saved = read_adapter(path)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.tensors.items():
        module, _, part = name.rpartition(".")
        if part in ADAPTER_PARAMETERS:
            layers.setdefault(module, {})[part] = tensor
    return AdapterInspection(
        path=str(path),
        base_model=saved.base_model,
        package_version=saved.package_version,
        config=saved.config.to_dict(),
        layers=[_statistics(saved, name, layers[name]) for name in sorted(layers, key=_in_order)],
        trainable=sum(tensor.numel() for tensor in saved.tensors.values()),
        offsets={
            name.replace(OFFSET, "").replace(ADDED, ""): (
                float(tensor.abs().mean()),
                float(tensor.abs().max()),
            )
            for name, tensor in sorted(saved.tensors.items(), key=lambda item: _in_order(item[0]))
            if name.rpartition(".")[2].startswith(BESIDE)
        },
    )


def inspect_model(
    name: str,
    options: Mapping[str, Any],
    *,
    adapter: str | Path | None = None,
    lists: Sequence[str] = (),
) -> ModelInspection:
    """Say what adapters would do in a model, from its configuration alone; no weight is read.

    Args:
        name: As for :func:`load_model`.
        options: Adapter options of ``FinetuneConfig``, its methods and its preset. Where they name
            ``target_modules``, what PEFT's LoRA would do on those is said too.
        adapter: Directory of an adapter, PEFT's or this package's, whose targets are checked.
        lists: Toolkits whose published lists for this kind of model are checked:
            :data:`~prodial_kernels.models.diagnosis.published.TOOLKITS`, or ``"all"``.

    Raises:
        AdapterError: ``adapter`` names no targets.
        ConfigError: An unknown or unusable option, or an unknown toolkit.
        ModelError: There is no such model, or its configuration cannot be read.
        ValueError: The adapter does not fit the model, and nothing else was asked for.
    """
    for toolkit in lists:
        check_choice("`list`", toolkit, (*TOOLKITS, "all"), error=ConfigError)
    config = FinetuneConfig.from_dict(options).resolved()
    model = empty_model(name, dtype=torch.float32)
    checked = [*_from_adapter(model, adapter), *_published(model, lists)]
    targets = options.get("target_modules")
    if targets is not None:
        checked.insert(0, _checked(model, "--target-modules", targets))
    kind = str(getattr(model.config, "model_type", ""))
    unlisted = [name for name in lists if name != "all" and not published_for(kind, [name])]
    if (checked or lists) and not options:
        return ModelInspection(name, None, None, None, checked, unlisted)
    try:
        own = adapter_for(model, config)
        names = resolve_placements(model, own).target_modules
        # Methods alone name no layers to look into.
        notes = diagnose(model, names, method="prodial").notes if names else ()
        report = apply_prodial(model, own)
    except ValueError as error:
        if not checked or isinstance(error, ConfigError):
            raise
        return ModelInspection(name, None, None, str(error), checked, unlisted)
    settings = get_prodial_config(model).to_dict()
    return ModelInspection(name, settings, report, None, checked, unlisted, notes)


def _checked(
    model: nn.Module,
    origin: str,
    targets: str | Sequence[str],
    *,
    method: str = "lora",
    exclude: Sequence[str] = (),
) -> CheckedTargets:
    if not isinstance(targets, str) or targets in PLACEMENTS:
        names = [targets] if isinstance(targets, str) else targets
        # A placement that the model has not is said to be absent.
        with suppress(ValueError):
            names = resolve_placements(
                model, ProdialConfig(target_modules=tuple(names))
            ).target_modules
        targets = names
    shown = targets if isinstance(targets, str) else " ".join(targets)
    shown += f", not {' '.join(exclude)}" if exclude else ""
    return CheckedTargets(origin, shown, diagnose(model, targets, method=method, exclude=exclude))


def _published(model: nn.Module, lists: Sequence[str]) -> list[CheckedTargets]:
    toolkits = TOOLKITS if "all" in lists else tuple(lists)
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    return [
        _checked(model, entry.source, entry.targets, exclude=entry.exclude)
        for entry in published_for(kind, toolkits)
    ]


def _from_adapter(model: nn.Module, adapter: str | Path | None) -> list[CheckedTargets]:
    if adapter is None:
        return []
    try:
        content = json.loads((Path(adapter) / CONFIG_FILE).read_text(encoding="utf-8"))
        peft = content.get("peft_type")
        values = content if peft is not None else content["config"]
        targets, exclude = values["target_modules"], values.get("exclude_modules") or ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{adapter} holds no adapter whose targets can be read: {error!r}"
        ) from error
    if not targets or not isinstance(targets, str | list):
        raise AdapterError(f"{adapter} names no target_modules, but {targets!r}")
    if isinstance(exclude, str):
        exclude = [exclude]
    method = "prodial" if peft in (None, "PRODIAL") else "lora"
    return [_checked(model, str(adapter), targets, method=method, exclude=exclude)]


def _in_order(path: str) -> list[tuple[int, str]]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _statistics(saved: SavedAdapter, module: str, parts: Mapping[str, Tensor]) -> LayerStatistics:
    blocks, scale = parts.get("prodial_blocks"), parts.get("prodial_scale")
    a, b = parts.get("prodial_a"), parts.get("prodial_b")
    moved = None if blocks is None else deviation(blocks, saved.config.diagonal).abs()
    shift = None if scale is None else scale.abs()
    r = None if a is None else a.shape[0]
    alpha = 0.0 if not r or saved.config.lora_alpha is None else saved.config.lora_alpha / r
    return LayerStatistics(
        module=module,
        trainable=sum(tensor.numel() for tensor in parts.values()),
        n_blocks=None if blocks is None else blocks.shape[0],
        block_size=None if blocks is None else blocks.shape[1],
        diagonal_mean=None if moved is None else float(moved.mean()),
        diagonal_max=None if moved is None else float(moved.max()),
        scale_mean=None if shift is None else float(shift.mean()),
        scale_max=None if shift is None else float(shift.max()),
        r=r,
        lora_norm=None if a is None or b is None else alpha * _product_norm(b, a),
    )


def _product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of ``B A`` without forming it: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
    b, a = b.double(), a.double()
    return float(torch.sqrt(((b.T @ b) * (a @ a.T)).sum().clamp(min=0)))


def _cells(layer: LayerStatistics) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2e}"

    blocks = f"{layer.n_blocks} of {layer.block_size}×{layer.block_size}" if layer.n_blocks else ""
    return (
        printable(layer.module), f"{layer.trainable:,}", blocks,
        number(layer.diagonal_mean), number(layer.diagonal_max),
        number(layer.scale_mean), number(layer.scale_max),
        "" if layer.r is None else str(layer.r), number(layer.lora_norm),
    )  # fmt: skip
