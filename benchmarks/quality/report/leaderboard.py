"""The leaderboard: rows of a study summed up, as JSON and as a page with pictures."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods.registry import METHODS
from benchmarks.quality.report.claims import judged, lines_of
from benchmarks.quality.report.statistics import (
    critical_difference,
    friedman,
    mean_ranks,
    sign_flip,
    spread,
)
from benchmarks.quality.study.row import Row
from benchmarks.quality.study.runner import chosen_rate

__all__ = ["FORMAT", "leaderboard", "page", "write"]

FORMAT = 1
REFERENCE = "lora"
"""What methods are compared with in pairs of equal task and seed."""
_LEAST = 4.0  # percent by which parameters may miss a budget without a mark


def leaderboard(rows: Iterable[Row], note: str = "") -> dict[str, Any]:
    """Sum rows up.

    Args:
        rows: Of any bases, tasks and methods.
        note: What a reader must know first: a toy, an unfinished study.

    Returns:
        ``{"format", "note", "cells", "ranks", "claims"}``. A cell has ``base``, ``task``,
        ``method``, ``budget``, ``learning_rate``, ``edge`` (the rate is its grid's largest or
        smallest), ``seeds``, ``test`` and ``test_sd`` (accuracy), ``validation``, ``parameters``,
        ``gap`` (percent of the budget), ``seconds``, ``tokens_per_second``, ``peak_bytes``, ``p``
        and ``difference`` (against LoRA at that budget, paired by seed), ``values`` (by seed) and
        ``where``. Others' cells may have more keys. ``ranks`` has, for each base and budget, mean
        ranks over the tasks that half of its methods have or more (of methods that have them all,
        the others are ``left_out``), Friedman's statistic and the critical difference; ``claims``
        is what :func:`~benchmarks.quality.report.claims.judged` returns.
    """
    cells: dict[tuple[str, str, str, str], dict[str, list[Row]]] = defaultdict(
        lambda: {"sweep": [], "final": []}
    )
    for row in rows:
        cells[row.spec.cell][row.phase].append(row)
    found = []
    for (base, task, method, budget), parts in sorted(cells.items()):
        final = [row for row in parts["final"] if row.status == "ok"]
        chosen = chosen_rate(parts["sweep"])
        cell: dict[str, Any] = {"base": base, "task": task, "method": method, "budget": budget}
        if not final:
            bad = [row for row in (*parts["sweep"], *parts["final"]) if row.status != "ok"]
            if bad:
                found.append({**cell, "status": bad[-1].status, "note": bad[-1].note})
            continue
        test, sd = spread([row.figures["test"] for row in final])
        first = final[0].figures
        target = first.get("target", 0)
        cell |= {
            "status": "ok",
            "learning_rate": final[0].spec.learning_rate,
            "edge": chosen is not None and chosen[1],
            "diverged": sum(row.status == "diverged" for row in parts["final"]),
            "seeds": len(final),
            "test": round(test, 5),
            "test_sd": round(sd, 5),
            "validation": round(spread([r.figures["validation"] for r in final])[0], 5),
            "parameters": first["parameters"],
            "gap": round(100 * (first["parameters"] / target - 1), 2) if target else None,
            "values": {str(row.spec.seed): row.figures["test"] for row in final},
            "where": final[0].where,
        }
        for name in ("seconds", "tokens_per_second", "peak_bytes"):
            values = [row.figures[name] for row in final if row.figures.get(name) is not None]
            cell[name] = round(spread(values)[0], 3) if values else None
        found.append(cell)
    _compare(found)
    return {
        "format": FORMAT, "note": note, "cells": found, "ranks": _ranks(found),
        "claims": judged(found),
    }  # fmt: skip


def _good(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["status"] == "ok"]


def _compare(cells: list[dict[str, Any]]) -> None:
    """Add the paired test against LoRA; methods of one size are compared with every budget's."""
    references = {
        (cell["base"], cell["task"], cell["budget"]): cell["values"]
        for cell in _good(cells)
        if cell["method"] == REFERENCE
    }
    for cell in _good(cells):
        budget = "medium" if cell["budget"] == "own" else cell["budget"]
        other = references.get((cell["base"], cell["task"], budget))
        seeds = sorted(cell["values"].keys() & (other or {}).keys())
        if other is None or not seeds or cell["method"] == REFERENCE:
            continue
        differences = [cell["values"][seed] - other[seed] for seed in seeds]
        cell["difference"] = round(spread(differences)[0], 5)
        cell["p"] = round(sign_flip(differences), 4)


def _ranks(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each base and budget: methods of one size compete in all budgets."""
    found = []
    good = _good(cells)
    for base in sorted({cell["base"] for cell in good}):
        for budget in ("small", "medium", "large"):
            here = [c for c in good if c["base"] == base and c["budget"] in (budget, "own")]
            if not any(c["budget"] == budget for c in here):
                continue
            of_method: dict[str, dict[str, float]] = defaultdict(dict)
            for cell in here:
                if METHODS[cell["method"]].group in ("method", "placement"):
                    of_method[cell["method"]][cell["task"]] = cell["test"]
            counts = Counter(task for scores in of_method.values() for task in scores)
            # A task that has only been begun must not leave everything else out.
            tasks = sorted(task for task, n in counts.items() if 2 * n >= len(of_method))
            complete = {m: s for m, s in of_method.items() if set(tasks) <= s.keys()}
            if len(complete) < 2:
                continue
            ranks = mean_ranks({m: [s[task] for task in tasks] for m, s in complete.items()})
            within = len(ranks) <= 20
            found.append(
                {
                    "base": base,
                    "budget": budget,
                    "tasks": tasks,
                    "ranks": {m: round(r, 3) for m, r in sorted(ranks.items(), key=_second)},
                    "left_out": sorted(of_method.keys() - complete.keys()),
                    "friedman": round(friedman(ranks, len(tasks)), 3),
                    "critical_difference": (
                        round(critical_difference(len(ranks), len(tasks)), 3) if within else None
                    ),
                }
            )
    return found


def _second(item: tuple[str, float]) -> float:
    return item[1]


def page(board: dict[str, Any]) -> str:
    """The leaderboard as Markdown: a table for each base and budget."""
    lines = ["# Leaderboard", ""]
    if board["note"]:
        lines += [f"**{board['note']}**", ""]
    lines += [
        "Test accuracy in percent, mean ± standard deviation over seeds; the learning rate was "
        "chosen on the validation split, from four. ↑ ↓: paired by seed, better or worse than LoRA "
        "at p < 0.07 (with five seeds the least possible is 0.0625). *: the chosen rate is the "
        "largest or smallest of the four. Parameters do not count a classifier.",
        "",
    ]
    for group in board["ranks"]:
        base, budget, tasks = group["base"], group["budget"], group["tasks"]
        cells = {
            (c["method"], c["task"]): c
            for c in _good(board["cells"])
            if c["base"] == base and c["budget"] in (budget, "own")
        }
        lines += [f"## {base}, {budget}", ""]
        lines += [_line(["method", "parameters", *tasks, "mean", "rank"])]
        lines += [_line(["---"] + ["---:"] * (len(tasks) + 3))]
        for method in [*group["ranks"], *_others(cells, group)]:
            mine = [cells.get((method, task)) for task in tasks]
            have = [c for c in mine if c is not None]
            if not have:
                continue
            mean = (
                f"{100 * spread([c['test'] for c in have])[0]:.1f}"
                if len(have) == len(tasks)
                else "–"
            )
            lines.append(
                _line(
                    [
                        METHODS[method].title,
                        _size(have[0]),
                        *(_accuracy(c) for c in mine),
                        mean,
                        f"{group['ranks'][method]:.2f}" if method in group["ranks"] else "–",
                    ]
                )
            )
        if group["critical_difference"] is not None:
            lines += [
                "",
                "Critical difference of ranks (Nemenyi, 0.05): "
                f"{group['critical_difference']:.2f}; Friedman {group['friedman']:.1f}.",
            ]
        lines.append("")
    lines += lines_of(board["claims"])
    bad = [c for c in board["cells"] if c["status"] != "ok"]
    if bad:
        lines += ["## Not run", ""]
        notes = {(c["base"], c["method"], c["status"], c["note"]) for c in bad}
        lines += [f"- {b}, {m}: {s}. {n}" for b, m, s, n in sorted(notes)] + [""]
    return "\n".join(lines)


def _others(cells: dict[tuple[str, str], Any], group: dict[str, Any]) -> list[str]:
    return sorted({method for method, _ in cells} - group["ranks"].keys())


def _line(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def _size(cell: dict[str, Any]) -> str:
    text = f"{cell['parameters']:,}"
    if cell["gap"] is not None and abs(cell["gap"]) > _LEAST:
        text += f" ({cell['gap']:+.0f}%)"
    return text


def _accuracy(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    mark = "*" if cell["edge"] else ""
    if cell.get("p", 1.0) < 0.07 and cell["seeds"] >= 5:
        mark += "↑" if cell["difference"] > 0 else "↓"
    return f"{100 * cell['test']:.1f} ± {100 * cell['test_sd']:.1f}{mark}"


def write(board: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``leaderboard.json``, ``.md`` and a picture of ranks per base and budget."""
    from benchmarks.quality.report.plots import draw_ranks

    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / "leaderboard.json", folder / "leaderboard.md"
    # A cell a line, so that changes can be read.
    cells = ",\n  ".join(json.dumps(cell, ensure_ascii=False) for cell in board["cells"])
    head = json.dumps({"format": board["format"], "note": board["note"]}, ensure_ascii=False)
    ranks = json.dumps(board["ranks"], ensure_ascii=False)
    claims = json.dumps(board["claims"], ensure_ascii=False)
    data.write_text(
        f'{head[:-1]}, "cells": [\n  {cells}\n ],\n "ranks": {ranks},\n "claims": {claims}}}\n',
        encoding="utf-8",
    )
    markdown = page(board)
    written = [data, text]
    for group in board["ranks"]:
        if group["critical_difference"] is None:
            continue
        path = folder / f"ranks-{group['base']}-{group['budget']}.png"
        draw_ranks(group, path)
        written.append(path)
        markdown += f"\n![Mean ranks: {group['base']}, {group['budget']}]({path.name})\n"
    text.write_text(markdown, encoding="utf-8")
    return written
