"""The picture of a run: its training loss, raw and smoothed, and the held-out evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A window of the smoothed curve is this share of the run, and at least so many steps.
_WINDOW_SHARE = 0.1
_LEAST_WINDOW = 7


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw training loss, smoothed and raw, and held-out points of ``metrics.jsonl`` as a PNG."""
    # The object interface: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"]]
    held_out = [r for r in records if r["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.set_title(title, fontsize=10, wrap=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    lines: list[Any] = []
    if train:
        steps, losses = zip(*train, strict=True)
        lines += axes.plot(
            steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="train, each step"
        )
        window = window_of(len(losses))
        lines += axes.plot(
            steps, smoothed(steps, losses, window), color="tab:blue", linewidth=1.8,
            label=f"train, smoothed over {window} steps",
        )  # fmt: skip
    points = [r for r in held_out if r.get("loss") is not None]
    if points:
        lines += axes.plot(
            [r["step"] for r in points], [r["loss"] for r in points],
            "o-", color="tab:orange", markersize=4, zorder=3, label=_bits(points),
        )  # fmt: skip
    scored = [r for r in held_out if r.get("acc") is not None]
    if scored:
        right = axes.twinx()
        right.set_ylabel("held-out accuracy")
        right.set_ylim(0, 1)
        lines += right.plot(
            [r["step"] for r in scored], [r["acc"] for r in scored],
            "o-", color="tab:green", markersize=4,
            label=f"held-out accuracy: {scored[0]['acc']:.1%} to {scored[-1]['acc']:.1%}",
        )  # fmt: skip
    # Under the axes, where no curve can be.
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.savefig(path, format="png")


def window_of(steps: int) -> int:
    """Return over how many of ``steps`` steps the smoothed curve looks; an odd number."""
    return min(steps, max(_LEAST_WINDOW, round(_WINDOW_SHARE * steps))) // 2 * 2 + 1


def smoothed(steps: Sequence[float], values: Sequence[float], window: int) -> list[float]:
    """Smooth a curve by straight lines, each fitted to the points around a place.

    Unlike a moving average it does not lag behind a slope, and neither end hangs on one point: near
    an end the window holds fewer points, all on one side.

    Args:
        steps: Increasing places, ``[n]``.
        values: The curve there, ``[n]``.
        window: How many points a line is fitted to in the middle of the curve; odd.

    Returns:
        ``[n]``: each line's value at its place.
    """
    import numpy as np

    y = np.asarray(values, dtype=np.float64)
    # Sums over a window are differences of running sums, which want small numbers.
    x = np.asarray(steps, dtype=np.float64) - steps[0]
    x /= max(1.0, x[-1])
    n, half = len(y), window // 2
    first = np.maximum(np.arange(n) - half, 0)
    end = np.minimum(np.arange(n) + half + 1, n)

    def total(terms: Any) -> Any:
        running = np.concatenate([[0.0], np.cumsum(terms)])
        return running[end] - running[first]

    count = end - first
    mean_x, mean_y = total(x) / count, total(y) / count
    spread = total(x * x) / count - mean_x**2
    slope = np.divide(
        total(x * y) / count - mean_x * mean_y, spread,
        out=np.zeros(n), where=spread > 1e-12 * max(1.0, float(np.max(np.abs(spread)))),
    )  # fmt: skip
    return [float(value) for value in mean_y + slope * (x - mean_x)]


def _bits(points: Sequence[Mapping[str, Any]]) -> str:
    first, last = points[0].get("bits_per_byte"), points[-1].get("bits_per_byte")
    if first is None or last is None:
        return "held-out"
    return f"held-out: {first:.3f} to {last:.3f} bits per byte"
