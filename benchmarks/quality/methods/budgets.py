"""Budgets of trainable parameters, and the rank and block size that meet one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["BUDGETS", "Knobs", "budget_of", "fit", "projectors"]

BUDGETS = {"small": 8, "medium": 24, "large": 72}
"""Rank of a LoRA on both projectors of every mixer: that has as many parameters."""

BLOCKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Knobs:
    """What a method is fitted with, and how many parameters that should make."""

    r: int
    block: int
    parameters: int


def projectors(model: nn.Module, names: Iterable[str]) -> list[tuple[int, int]]:
    """``(in_features, out_features)`` of every linear layer whose own name is among ``names``."""
    wanted = set(names)
    return [
        (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in wanted
    ]


def budget_of(model: nn.Module, budget: str) -> int:
    """Parameters of a budget for a model.

    Raises:
        ValueError: An unknown budget.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget: expected one of {', '.join(BUDGETS)}, got {budget!r}")
    shapes = projectors(model, ("in_proj", "out_proj"))
    return BUDGETS[budget] * sum(inputs + outputs for inputs, outputs in shapes)


def fit(
    shapes: Sequence[tuple[int, int]],
    target: int,
    *,
    scale: bool,
    blocks: str | None,
    fixed: int = 0,
) -> Knobs:
    """Choose rank and block size so that the count is as near to ``target`` as can be.

    Args:
        shapes: Of the adapted layers.
        target: Parameters to come near to.
        scale: Whether each layer has a vector of its outputs (ProDiaL's s, DoRA's magnitude).
        blocks: None without a diagonal; ``"one"`` for 1×1 blocks; ``"larger"`` for the largest
            block with which a rank of at least 1 comes within 3%, or else the nearest.
        fixed: Parameters besides, whatever the knobs.

    Raises:
        ValueError: ``blocks`` is another word.
    """
    if blocks not in (None, "one", "larger"):
        raise ValueError(f"blocks: expected None, 'one' or 'larger', got {blocks!r}")
    inputs, outputs = sum(i for i, _ in shapes), sum(o for _, o in shapes)
    sizes: Sequence[int] = {None: (0,), "one": (1,), "larger": BLOCKS}[blocks]
    sizes = [p for p in sizes if p == 0 or all(i % p == 0 for i, _ in shapes)]
    found = []
    for block in sizes:
        rest = fixed + scale * outputs + block * inputs
        r = max(1, round((target - rest) / (inputs + outputs)))
        found.append(Knobs(r, block, rest + r * (inputs + outputs)))
    near = [k for k in found if abs(k.parameters - target) <= 0.03 * target]
    return near[-1] if near else min(found, key=lambda k: abs(k.parameters - target))
