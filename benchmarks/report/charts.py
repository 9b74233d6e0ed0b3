"""Pictures of a result: cost over the floor, scaling, time against memory, where the time goes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from benchmarks.models.rows import ModelRow
from benchmarks.projector.cases import Case
from benchmarks.projector.rivals import FLOOR, OURS, RIVALS
from benchmarks.projector.rows import ProjectorRow, by_case, find
from benchmarks.projector.scaling import series
from benchmarks.report.record import Record
from benchmarks.training.jobs import JobRow

Rows = Sequence[ProjectorRow]

# Colours that stay apart for colour-blind readers; ProDiaL's is the strongest.
OURS_COLOUR, FLOOR_COLOUR = "#0072B2", "#555555"
COLOURS = (
    "#E69F00", "#D55E00", "#F0C9A0", "#CC79A7", "#E6B8D2",
    "#8B4513", "#009E73", "#9AD8C4", "#56B4E9", "#A9D6F2", "#C9B037",
)  # fmt: skip

OVERVIEW = {
    "frozen": ("frozen model, its own fast path", FLOOR_COLOUR),
    "prodial": ("ProDiaL, this package", OURS_COLOUR),
    "lora-slow": ("LoRA in plain PyTorch, fast path off", "#56B4E9"),
    "authors": ("ProDiaL, the authors' code", "#E69F00"),
}
"""Of the front page's picture: label and colour of every variant, in the order of the bars."""


def colour_of(rival: str) -> str:
    """The same colour for a rival in every picture."""
    if rival == OURS:
        return OURS_COLOUR
    if rival == FLOOR:
        return FLOOR_COLOUR
    others = [known.name for known in RIVALS if known.name not in (OURS, FLOOR)]
    return COLOURS[others.index(rival) % len(COLOURS)]


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw every picture that the record has figures for; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in (
        ("cost", cost(record.rows)),
        ("scaling", scaling(record.rows, record.sweeps)),
        ("time-memory", time_memory(record.rows)),
        ("kernels", kernels(record.rows)),
    ):
        if figure is None:
            continue
        figure.suptitle(_caption(record), fontsize=7, color="#666666", x=0.995, ha="right")
        path = folder / f"{record.name}-{name}.png"
        _save(figure, path)
        made.append(path)
    return made


def overview(models: Sequence[ModelRow], jobs: Sequence[JobRow], device: str, path: Path) -> None:
    """Draw the front page's picture: four bars of a step's time, and a line of its memory.

    Args:
        models: Of ``benchmarks.mixers``. The first case that all four variants ran is shown.
        jobs: Of ``benchmarks.finetune``. The first job that says what LoRA took before.
        device: On which the models were measured.
        path: The SVG to write; drawn again from the same records it has the same bytes.

    Raises:
        ValueError: No such case, or no such job.
    """
    cases: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in models:
        if row.status == "ok" and row.ms is not None:
            cases.setdefault(row.case, {})[row.variant] = row.ms
    case = next((at for at, took in cases.items() if set(took) >= set(OVERVIEW)), None)
    job = next((row for row in jobs if all(row.before)), None)
    if case is None or job is None:
        raise ValueError("the overview needs a case of all four variants, and a job with a before")
    times = [cases[case][variant] for variant in OVERVIEW]
    settings = {"svg.hashsalt": "prodial-kernels", "font.size": 9}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(8, 2.3), layout="constrained")
        labels, colours = zip(*OVERVIEW.values(), strict=True)
        bars = axes.barh(range(len(times)), times, 0.68, color=colours)
        axes.bar_label(bars, [f" {ms:.1f} ms, {ms / times[0]:.2f} ×" for ms in times], padding=1)
        axes.set_yticks(range(len(times)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, max(times) * 1.17)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        name, batch, length = case
        figure.suptitle(
            f"{name}, {batch} × {length} tokens, bf16: forward and backward on an "
            f"{device}",
            fontsize=9, x=0.01, ha="left",
        )  # fmt: skip
        ms, gb = job.before
        figure.supxlabel(
            f"A training step of {job.model}, {job.batch} × {job.length} tokens: LoRA "
            f"{gb:.1f} GB, {ms:.0f} ms; here {(job.peak_bytes or 0) / 1e9:.1f} GB, {job.ms:.0f} ms "
            f"(--memory-budget {job.memory_budget})",
            fontsize=9, x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    """Write a PNG with a palette: a third of the size, and no difference to be seen."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


def cost(rows: Rows) -> Any:
    """Forward and backward over the frozen layer's, by shape, a bar for each rival."""
    shapes = _table_cases(rows)
    names = [rival.name for rival in RIVALS if rival.name != FLOOR]
    names = [name for name in names if any(find(rows, rival=name, **at) for at in shapes)]
    if not shapes or len(names) < 2:
        return None
    figure, axes = plt.subplots(figsize=(11, 4.8), layout="constrained")
    # ProDiaL's bar is twice as wide, so that its figure fits in.
    ceiling, width = 6.0, 0.86 / (len(names) + 1)
    start = -0.43
    for name in names:
        wide = width * (1 + (name == OURS))
        found = [find(rows, rival=name, **at) for at in shapes]
        values = [(row.ratio or 0.0) if row else 0.0 for row in found]
        places = [x + start + wide / 2 for x in range(len(shapes))]
        heights = [min(value, ceiling) for value in values]
        axes.bar(places, heights, wide, color=colour_of(name), label=name)
        for x, value in zip(places, values, strict=True):
            if name == OURS and value:
                axes.text(
                    x, min(value, ceiling) - 0.08, f"{value:.2f}", color="white",
                    ha="center", va="top", rotation=90, fontsize=7.5, fontweight="bold",
                )  # fmt: skip
            elif value > ceiling:
                # Only where the picture cuts it off.
                axes.text(x, ceiling + 0.05, f"{value:.1f}", ha="center", fontsize=6, rotation=90)
        start += wide
    axes.axhline(1.0, color=FLOOR_COLOUR, linewidth=1)
    axes.text(len(shapes) - 0.47, 1.04, "frozen", color=FLOOR_COLOUR, ha="right", fontsize=7)
    axes.set_xticks(
        range(len(shapes)), [f"{at['m']},\n{at['k']}→{at['n']}" for at in shapes], fontsize=8
    )
    axes.set_xlim(-0.55, len(shapes) - 0.45)
    axes.set_ylim(0, ceiling + 0.6)
    axes.set_xlabel("tokens, in_features → out_features")
    axes.set_ylabel("forward + backward, × frozen layer")
    axes.set_title(
        "Cost of one trained projector over the frozen one (lower is better)", fontsize=11
    )
    _tidy(axes)
    _legend(figure, axes, 6)
    return figure


def scaling(rows: Rows, sweeps: Mapping[str, Sequence[Case]]) -> Any:
    """Time along each size, above; over the floor's, below."""
    drawn = {
        size: cases for size, cases in sweeps.items()
        if len(series(rows, cases, size, OURS, "both_us")) >= 2
    }  # fmt: skip
    if not drawn:
        return None
    figure, grid = plt.subplots(
        2,
        len(drawn),
        figsize=(3.3 * len(drawn) + 0.6, 6),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for column, (size, cases) in enumerate(drawn.items()):
        upper, lower = grid[0][column], grid[1][column]
        for rival in RIVALS:
            for axes, figure_name in ((upper, "both_us"), (lower, "ratio")):
                points = series(rows, cases, size, rival.name, figure_name)
                # Rivals that only some of its cases have are no curve.
                if len(points) < max(2, len(cases) / 2):
                    continue
                axes.plot(
                    *zip(*points, strict=True), marker="o", markersize=3,
                    linewidth=2 if rival.name == OURS else 1.2,
                    color=colour_of(rival.name), label=rival.name,
                )  # fmt: skip
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
        upper.yaxis.set_minor_locator(NullLocator())
        lower.set_ylim(bottom=0.9)
        lower.set_xscale("log", base=2)
        values = [getattr(case, size) for case in cases]
        lower.set_xticks(values, [str(value) for value in values], rotation=45, fontsize=7)
        lower.minorticks_off()
        lower.set_xlabel(
            {"m": "tokens M", "k": "in_features K", "p": "block size P", "r": "rank r"}[size]
        )
        _tidy(upper)
        _tidy(lower)
    grid[0][0].set_ylabel("forward + backward, µs")
    grid[1][0].set_ylabel("× frozen layer")
    grid[0][0].legend(fontsize=8, frameon=False)
    return figure


def time_memory(rows: Rows) -> Any:
    """Each rival as a point: peak memory over time, both over the frozen layer's."""
    shapes = _table_cases(rows, FLOOR, "peak_mib")
    if not shapes:
        return None
    # The smallest and the largest say what there is to see.
    shapes = shapes[:1] + shapes[-2:] if len(shapes) > 3 else shapes
    figure, grid = plt.subplots(
        1, len(shapes), figsize=(3.9 * len(shapes), 4.4), squeeze=False, layout="constrained"
    )
    for axes, at in zip(grid[0], shapes, strict=True):
        for rival in RIVALS:
            row = find(rows, rival=rival.name, **at)
            if row is None:
                continue
            axes.scatter(
                row.ratio, row.memory_ratio, s=70 if rival.name == OURS else 40,
                color=colour_of(rival.name), label=rival.name, zorder=3,
            )  # fmt: skip
        axes.set_title(f"M, K, N = {at['m']}, {at['k']}, {at['n']}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 6, 8)))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("time, × frozen")
        _tidy(axes)
    grid[0][0].set_ylabel("peak memory, × frozen")
    _legend(figure, grid[0][0], 7)
    return figure


def kernels(rows: Rows) -> Any:
    """ProDiaL's device time by kernel, beside the frozen layer's, as a share of the floor."""
    shapes = _table_cases(rows, OURS, "kernels_us")
    if not shapes:
        return None
    totals: dict[str, float] = {}
    bars: list[tuple[str, dict[str, float]]] = []
    for at in shapes:
        ours, floor = (find(rows, rival=rival, **at) for rival in (OURS, FLOOR))
        if ours is None or floor is None or not ours.kernels_us or not floor.kernels_us:
            continue
        frozen_us = sum(floor.kernels_us.values())
        shares = {name: took / frozen_us for name, took in ours.kernels_us.items()}
        bars.append((f"{at['m']},{at['k']}→{at['n']}", shares))
        for name, share in shares.items():
            totals[name] = totals.get(name, 0.0) + share
    names = sorted(totals, key=lambda name: -totals[name])[:9]
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(bars) + 1.9), layout="constrained")
    palette = plt.get_cmap("tab10")
    for place, (_, shares) in enumerate(bars):
        start = 0.0
        rest = sum(share for name, share in shares.items() if name not in names)
        for i, (name, share) in enumerate(
            [*((n, shares.get(n, 0.0)) for n in names), ("other", rest)]
        ):
            axes.barh(place, share, left=start, color=palette(i) if name != "other" else "#cccccc",
                      label=name.lstrip("_") if place == 0 else None, height=0.7)  # fmt: skip
            start += share
        axes.text(start + 0.01, place, f"{start:.2f}", va="center", fontsize=7.5)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.text(1.0, -0.75, "frozen", ha="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("device time of ProDiaL's kernels, × frozen layer's")
    _tidy(axes)
    _legend(figure, axes, 5)
    return figure


def _table_cases(rows: Rows, rival: str = "", figure: str = "") -> list[dict[str, Any]]:
    """The cases of the table, or those where a rival has a figure: what the pictures show."""
    cases = by_case(row for row in rows if row.part == "table")
    if not rival:
        return [case[0].at for case in cases]
    found = (find(case, rival=rival) for case in cases)
    return [row.at for row in found if row and getattr(row, figure)]


def _caption(record: Record) -> str:
    environment = record.environment
    versions = environment["versions"]
    dtypes = sorted({row.dtype for row in record.rows})
    return (
        f"{environment['device']}, {', '.join(dtypes)}, torch {versions['torch']}, "
        f"triton {versions['triton']}, {environment['date']}"
    )


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """One legend below the picture."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=columns, loc="outside lower center", fontsize=7.5, frameon=False
    )


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
