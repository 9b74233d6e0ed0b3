"""What an adapter on disk holds and how far it has moved; what one would train in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prodial_kernels._checks import printable
from prodial_kernels.checkpoint import SavedAdapter, read_adapter
from prodial_kernels.files.json_values import JsonReport
from prodial_kernels.linear import ADAPTER_PARAMETERS, OFFSET
from prodial_kernels.models.adapt.inject import apply_prodial
from prodial_kernels.models.adapt.report import AdapterReport, table_lines
from prodial_kernels.models.loading.load import load_model, resolve_device, resolve_dtype
from prodial_kernels.ops.diagonal import deviation
from prodial_kernels.training.config import FinetuneConfig
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
        offsets: For each state-space parameter trained beside, by its dotted path, the mean and the
            largest size of its offset from the pretrained value.
    """

    path: str
    base_model: str | None
    package_version: str
    config: Mapping[str, Any]
    layers: Sequence[LayerStatistics]
    trainable: int
    offsets: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        writer = f"written by prodial-kernels {self.package_version}"
        head = two_columns(
            [
                ("adapter", printable(f"{self.path} ({writer})")),
                ("base model", printable(str(self.base_model or "not named"))),
                ("configuration", settings),
                ("parameters", f"{self.trainable:,}"),
            ]
        )
        columns = (
            "module", "parameters", "blocks", "|D_b-I| mean", "max",
            "|s-1| mean", "max", "r", "norm of aBA",
        )  # fmt: skip
        lines = [head, "", *table_lines([columns, *map(_cells, self.layers)])]
        if self.offsets:
            rows = [
                (printable(path), f"{mean:.2e}", f"{most:.2e}")
                for path, (mean, most) in self.offsets.items()
            ]
            lines += ["", *table_lines([("parameter", "|offset| mean", "max"), *rows])]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelInspection(JsonReport):
    """What an adapter would train in a model. ``str()`` is a table.

    Attributes:
        model: What the model was loaded by.
        config: The adapter's configuration.
        report: What it would train.
    """

    model: str
    config: Mapping[str, Any]
    report: AdapterReport

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"{two_columns([('model', self.model), ('adapter', settings)])}\n\n{self.report}"


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
            name.replace(OFFSET, ""): (float(tensor.abs().mean()), float(tensor.abs().max()))
            for name, tensor in sorted(saved.tensors.items(), key=lambda item: _in_order(item[0]))
            if name.rpartition(".")[2].startswith(OFFSET)
        },
    )


def inspect_model(name: str, options: Mapping[str, Any]) -> ModelInspection:
    """Load a model and report what an adapter would train in it.

    Args:
        name: As for :func:`load_model`.
        options: Adapter options of ``FinetuneConfig``, and its preset.

    Raises:
        ConfigError: An unknown or unusable option.
        ModelError: The model cannot be loaded.
        ValueError: The adapter does not fit the model.
    """
    config = FinetuneConfig.from_dict(options).resolved()
    device = resolve_device("cpu")
    model = load_model(name, device=device, dtype=resolve_dtype("float32", device)).model
    adapter = adapter_for(model, config)
    return ModelInspection(name, adapter.to_dict(), apply_prodial(model, adapter))


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
