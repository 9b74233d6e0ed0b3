"""The picture of a search: every trial, the best so far, and size against quality."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from prodial_kernels.search.record import Record, ranked
from prodial_kernels.search.result import SearchResult

_STYLE = {"methods": ("o", "tab:blue"), "sizes": ("s", "tab:orange")}
_NAMED = 3


def plot_search(result: SearchResult, path: Path) -> None:
    """Draw a search with at least one trial that came to its end, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    done = sorted(ranked(result.records), key=lambda record: record.number)
    values = [_value(record) for record in done]
    left.set(xlabel="trial", ylabel=f"held-out {result.objective}")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.step(
        [record.number for record in done], list(accumulate(values, min)), where="post",
        color="tab:gray", linewidth=1, label="best so far",
    )  # fmt: skip
    right.set(xlabel="trained parameters (the best with their numbers)", xscale="log")
    for step, (marker, color) in _STYLE.items():
        for several in (False, True):
            some = [r for r in done if r.step == step and (len(r.on) > 1) is several]
            if not some:
                continue
            style: dict[str, Any] = {
                "marker": marker, "linestyle": "", "markersize": 5, "color": color,
                "markerfacecolor": color if several else "none",
                "label": f"{step}: {'combinations' if several else 'by itself'}",
            }  # fmt: skip
            left.plot([r.number for r in some], [_value(r) for r in some], **style)
            right.plot([r.trainable for r in some], [_value(r) for r in some], **style)
    for record in ranked(result.records)[:_NAMED]:
        right.annotate(
            str(record.number), (record.trainable, _value(record)), fontsize=7,
            xytext=(4, 4), textcoords="offset points",
        )  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.25)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, format="png")


def _value(record: Record) -> float:
    return float("nan") if record.value is None else record.value
