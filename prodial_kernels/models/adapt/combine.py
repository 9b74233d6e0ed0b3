"""A weighted sum of adapters as one adapter, where that sum has the form of an adapter.

W' = s ⊙ (W D_b) + α B A multiplies the weight by s and by D_b, and a sum of such products is no
such product. W' − W is W (D_b − I) + α B A without s, and (s − 1) ⊙ W + α B A without D_b: these
add up, B A by concatenation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor, nn

from prodial_kernels.models.adapt.named_layer import NamedProdialLinear
from prodial_kernels.ops.diagonal import deviation

WHY_NOT = (
    "W' = s ⊙ (W D_b) + α B A multiplies the weight by s and by D_b, and a sum of such products is "
    "no such product"
)


class Combinable(Protocol):
    """What is asked of an adapter's configuration, this package's or PEFT's."""

    @property
    def train_scale(self) -> bool:
        """Whether it has s."""

    @property
    def train_diagonal(self) -> bool:
        """Whether it has D_b."""

    @property
    def diagonal(self) -> str:
        """How the diagonal of D_b is made of D_a."""


@dataclass(frozen=True)
class Combination:
    """The form of a sum: ranks and sides of the blocks by the layers' paths, and the parts.

    Attributes:
        ranks: Of every layer that one of the adapters has.
        sizes: Likewise; 1 where the sum has no blocks.
        diagonal: ``"relu"`` where that holds for the sum, else ``"free"``.
        train_scale: Whether the sum has s.
        train_diagonal: Whether it has D_b.
    """

    ranks: dict[str, int]
    sizes: dict[str, int]
    diagonal: str
    train_scale: bool
    train_diagonal: bool


def check_combination(configs: Mapping[str, Combinable], weights: Sequence[float]) -> None:
    """Refuse combinations without an exact form.

    Raises:
        ValueError: Adapters with both s and D_b, or with modules trained as a whole or LoRA beside
            them, or another number of weights than of adapters.
        TypeError: A weight that is no finite number.
    """
    if not configs or len(configs) != len(weights):
        raise ValueError(f"give one weight for each adapter, got {len(weights)} for {[*configs]}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
            raise TypeError(f"weights must be finite numbers, got {weight!r}")
    if any(c.train_scale for c in configs.values()) and any(
        c.train_diagonal for c in configs.values()
    ):
        raise ValueError(
            f"a weighted combination of {[*configs]} is not defined: {WHY_NOT}. It is defined "
            "among adapters without s (train_scale=False), and among adapters without D_b "
            "(train_diagonal=False)"
        )
    for name, config in configs.items():
        for option in ("modules_to_save", "lora"):
            if getattr(config, option, None):
                raise ValueError(f"adapter {name!r} has {option}, which cannot be combined")


def combination_of(
    configs: Mapping[str, Combinable],
    weights: Sequence[float],
    layers: Mapping[str, NamedProdialLinear],
) -> Combination:
    """Return the form of the sum; ValueError where a layer has blocks of two sizes."""
    ranks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for path, layer in layers.items():
        held = [name for name in configs if name in layer.adapter_names]
        if not held:
            continue
        ranks[path] = sum(layer.options_of(name)["r"] for name in held)
        found = {
            layer.options_of(name)["block_size"] for name in held if configs[name].train_diagonal
        }
        if len(found) > 1:
            raise ValueError(
                f"{path}: the adapters have blocks of sides {sorted(found)}; only equal ones have "
                "a sum of that form"
            )
        sizes[path] = found.pop() if found else 1
    relu = all(c.diagonal == "relu" for c in configs.values()) and min(weights) >= 0
    return Combination(
        ranks, sizes, "relu" if relu else "free",
        any(config.train_scale for config in configs.values()),
        any(config.train_diagonal for config in configs.values()),
    )  # fmt: skip


@torch.no_grad()
def fill_combination(
    layer: NamedProdialLinear, name: str, adapters: Sequence[str], weights: Sequence[float]
) -> None:
    """Write the weighted sum into the tensors of adapter ``name``: W' − W is its sum exactly.

    The adapter is at its initial values, and its α is 1. A rank above the sum's stays initial.
    """
    with layer.reading(name):
        scale, blocks, diagonal = layer.prodial_scale, layer.prodial_blocks, layer.diagonal
        lora_a, lora_b = layer.prodial_a, layer.prodial_b
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter not in layer.adapter_names:
            continue
        with layer.reading(adapter):
            if layer.prodial_scale is not None:
                _of(scale).add_(layer.prodial_scale, alpha=weight)
            if layer.prodial_blocks is not None:
                _of(blocks).add_(deviation(layer.prodial_blocks, layer.diagonal), alpha=weight)
            if layer.prodial_a is not None and layer.prodial_b is not None:
                rows.append(layer.prodial_a)
                columns.append(weight * layer.lora_scaling * layer.prodial_b)
    if blocks is not None and diagonal == "relu":
        # So far E = D_b - I, whose diagonal is not positive; from here on the D_a that gives it.
        blocks.diagonal(dim1=-2, dim2=-1).neg_()
    if rows:
        a, b = torch.cat(rows, 0), torch.cat(columns, 1)
        _of(lora_a)[: len(a)] = a
        _of(lora_b)[:, : len(a)] = b


def _of(part: nn.Parameter | None) -> Tensor:
    if part is None:
        raise RuntimeError("the combined adapter lacks a part that one of its adapters has")
    return part
