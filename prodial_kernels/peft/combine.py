"""A weighted sum of adapters as one adapter, where that sum has the form of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prodial_kernels.ops.diagonal import deviation
from prodial_kernels.peft.config import ProdialPeftConfig
from prodial_kernels.peft.layer import ProdialPeftLinear

WHY_NOT = (
    "W' = s ⊙ (W D_b) + α B A multiplies the weight by s and by D_b, and a sum of such products is "
    "no such product"
)


def check_combination(
    configs: dict[str, ProdialPeftConfig], weights: Sequence[float], combination_type: str
) -> None:
    """Refuse combinations without an exact form.

    Raises:
        ValueError: Adapters with both s and D_b, or with modules trained as a whole or LoRA beside
            them; another number of weights; or a ``combination_type`` other than ``"cat"``.
    """
    if combination_type != "cat":
        raise ValueError(
            f'combination_type must be "cat", the only one whose result is the weighted sum of the '
            f"adapters' effects, got {combination_type!r}"
        )
    if not configs or len(configs) != len(weights):
        raise ValueError(f"give one weight for each adapter, got {len(weights)} for {[*configs]}")
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
            if getattr(config, option):
                raise ValueError(f"adapter {name!r} has {option}, which cannot be combined")


def combined_config(
    configs: dict[str, ProdialPeftConfig],
    weights: Sequence[float],
    layers: dict[str, ProdialPeftLinear],
) -> ProdialPeftConfig:
    """Return the combination by exact paths; ValueError where a layer has blocks of two sizes."""
    ranks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for path, layer in layers.items():
        held = [name for name in configs if name in layer._prodial_options]
        if not held:
            continue
        ranks[path] = sum(layer._prodial_options[name]["r"] for name in held)
        found = {
            layer._prodial_options[name]["block_size"]
            for name in held
            if configs[name].train_diagonal
        }
        if len(found) > 1:
            raise ValueError(
                f"{path}: the adapters have blocks of sides {sorted(found)}; only equal ones have "
                "a sum of that form"
            )
        sizes[path] = found.pop() if found else 1
    relu = all(c.diagonal == "relu" for c in configs.values()) and min(weights) >= 0
    return replace(
        next(iter(configs.values())),
        target_modules=sorted(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        r=max(ranks.values()),
        rank_pattern=ranks,
        lora_alpha=None,
        alpha_pattern=None,
        n_blocks=None,
        block_size=sizes,
        diagonal="relu" if relu else "free",
        train_scale=any(config.train_scale for config in configs.values()),
        train_diagonal=any(config.train_diagonal for config in configs.values()),
    )


@torch.no_grad()
def fill_combination(
    layer: ProdialPeftLinear, name: str, adapters: Sequence[str], weights: Sequence[float]
) -> None:
    """Write the weighted sum into the tensors of adapter ``name``: W' − W is its sum exactly."""
    with layer.reading(name):
        scale, blocks, diagonal = layer.prodial_scale, layer.prodial_blocks, layer.diagonal
        lora_a, lora_b = layer.prodial_a, layer.prodial_b
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter not in layer._prodial_options:
            continue
        with layer.reading(adapter):
            if layer.prodial_scale is not None:
                scale += weight * layer.prodial_scale
            if layer.prodial_blocks is not None:
                blocks += weight * deviation(layer.prodial_blocks, layer.diagonal)
            if layer.prodial_a is not None:
                rows.append(layer.prodial_a)
                columns.append(weight * layer.lora_scaling * layer.prodial_b)
    if blocks is not None and diagonal == "relu":
        # So far E = D_b - I, whose diagonal is not positive; from here on the D_a that gives it.
        blocks.diagonal(dim1=-2, dim2=-1).neg_()
    if rows:
        lora_a.copy_(torch.cat(rows, 0))
        lora_b.copy_(torch.cat(columns, 1))
