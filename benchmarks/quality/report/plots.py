"""Pictures: critical differences of ranks, and the analyses'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_ranks", "draw_transform", "groups_within"]


def groups_within(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Longest runs of sorted ranks that lie within a difference, as (first, last), of two or more.

    Runs inside a longer one are left out.
    """
    found: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = first
        while last + 1 < len(ranks) and ranks[last + 1] - ranks[first] <= difference:
            last += 1
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def draw_ranks(group: Mapping[str, Any], path: Path) -> None:
    """A critical-difference diagram (Demšar 2006): bars join what cannot be told apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(group["ranks"])
    ranks = [group["ranks"][name] for name in names]
    bars = groups_within(ranks, group["critical_difference"])
    rows = (len(names) + 1) // 2
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.16 * len(bars) + 0.25 * rows))
    low, high = 1, len(names)
    margin = 0.45 * (high - low) + 1
    axes.set_xlim(low - margin, high + margin)
    top = 0.6 + 0.3 * len(bars)
    axes.set_ylim(-(top + 0.6 * rows), 1.8)
    axes.axis("off")
    axes.plot([low, high], [0, 0], color="black", linewidth=1)
    for tick in range(low, high + 1):
        axes.plot([tick, tick], [0, 0.15], color="black", linewidth=1)
        axes.text(tick, 0.25, str(tick), ha="center", va="bottom", fontsize=8)
    axes.plot([low, low + group["critical_difference"]], [1.3, 1.3], color="tab:red", linewidth=2)
    axes.text(low, 1.4, f"critical difference {group['critical_difference']:.2f}", fontsize=8)
    for i, (first, last) in enumerate(bars):
        y = -0.35 - 0.3 * i
        axes.plot([ranks[first] - 0.05, ranks[last] + 0.05], [y, y], color="black", linewidth=3)
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        left = i < rows
        y = -(top + 0.6 * (i if left else len(names) - 1 - i))
        end = low - 0.3 if left else high + 0.3
        axes.plot([rank, rank, end], [0, y, y], color="grey", linewidth=0.8)
        text = f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}"
        axes.text(end, y, text, ha="right" if left else "left", va="center", fontsize=8)
    where = f"{group['base']}, {group['budget']}"
    axes.set_title(f"{where}: mean rank over {len(group['tasks'])} tasks", fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def draw_transform(name: str, T: np.ndarray, deviation: np.ndarray, path: Path) -> None:
    """Figure 2 of the paper: T itself, and |T - I|, of one projector or summed over several.

    Args:
        name: For the title.
        T: [d, d].
        deviation: |T - I| [d, d].
        path: A PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    shown = left.imshow(T, cmap="viridis", vmin=min(0.0, float(T.min())), vmax=1.0)
    left.set_title("T", fontsize=9)
    figure.suptitle(name, fontsize=10)
    figure.colorbar(shown, ax=left)
    shown = middle.imshow(deviation, cmap="magma")
    middle.set_title("|T − I|, all layers", fontsize=9)
    figure.colorbar(shown, ax=middle)
    diagonal = np.diagonal(deviation)
    rest = deviation[~np.eye(len(deviation), dtype=bool)]
    top = max(float(deviation.max()), 1e-12)
    bins = np.linspace(0, top, 60).tolist()
    right.hist(diagonal, bins, density=True, alpha=0.6, label="diagonal")
    right.hist(rest, bins, density=True, alpha=0.6, label="elsewhere")
    right.set_yscale("log")
    right.set_title("|T − I|: density", fontsize=9)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
