"""All methods by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.quality.methods import dense, foreign, prodial
from benchmarks.quality.methods.budgets import budget_of
from benchmarks.quality.methods.method import HEAD, Method

__all__ = ["METHODS", "SETS", "adapt", "method_named"]

METHODS: dict[str, Method] = {
    method.name: method for method in (*prodial.METHODS, *dense.METHODS, *foreign.METHODS)
}

SETS: dict[str, tuple[str, ...]] = {
    "all": tuple(METHODS),
    "core": (
        "none", "full", "probe", "bitfit", "lora", "rslora", "dora", "oft", "ia3", "prodial",
        "prodial-free", "prodial-no-s", "prodial-blocks", "prodial-free-blocks", "prodial-ssm",
    ),
    "placement": ("lora-in", "lora-out", "prodial-in", "prodial-out"),
    **{
        group: tuple(name for name, method in METHODS.items() if method.group == group)
        for group in ("component", "figure4")
    },
    "hybrid": ("lora-attention", "lora-all", "prodial-attention", "prodial-all"),
    "mambapeft": (
        "strong", "partial-lora", "parallel", "additional-scan", "partial-tuning",
    ),
}  # fmt: skip
"""Names that ``--methods`` takes for several."""


def method_named(name: str) -> Method:
    """Return a method.

    Raises:
        ValueError: An unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def adapt(model: Any, name: str, budget: str, classes: int | None = None) -> dict[str, int]:
    """Put a method into a model, in place; its classifier, if it has one, trains along.

    Args:
        model: A base's, in fp32.
        name: Of the method.
        budget: One of :data:`BUDGETS`, or ``"own"`` for methods of one size.
        classes: Of a vision task: the model gets a new ``head`` for them.

    Returns:
        ``parameters`` that train, without the classifier's; ``head``, the classifier's;
        ``target``, the budget's (0 for ``"own"``); ``total``, all parameters of the plain model.

    Raises:
        Unfit: The base has not what the method adapts.
        ValueError: An unknown name or budget, or a method of one size at another budget.
    """
    method = method_named(name)
    if method.own_size != (budget == "own"):
        sizes = "own" if method.own_size else "one of the budgets"
        raise ValueError(f"budget: {name} takes {sizes}, got {budget!r}")
    if classes is not None:
        weight = model.head.weight
        head = nn.Linear(weight.shape[1], classes).to(weight)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        model.head = head
    total = sum(p.numel() for p in model.parameters())
    target = 0 if budget == "own" else budget_of(model, budget)
    method.apply(model, target)
    if classes is not None:
        getattr(model, HEAD).requires_grad_(True)
    counts = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head_size = sum(counts[n] for n in counts if n.startswith(f"{HEAD}."))
    return {
        "parameters": sum(counts.values()) - head_size,
        "head": head_size,
        "target": target,
        "total": total,
    }
