"""What rows say of the paper's claims and of this package's defaults: pairs of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.report.statistics import sign_flip, sign_test, spread

__all__ = ["CLAIMS", "Claim", "judged", "lines_of"]


@dataclass(frozen=True)
class Claim:
    """That one method is better than another, at the same budget (or each of its own size).

    Attributes:
        text: In words.
        source: A table of the paper, or the default that it would settle.
        better: A method.
        worse: Another.
    """

    text: str
    source: str
    better: str
    worse: str


CLAIMS = (
    Claim("training projectors beats training state-space parameters", "Tables 1 and 2",
          "ft-both", "ft-ssm"),
    Claim("ProDiaL beats LoRA at equal parameters", "Table 3", "prodial", "lora"),
    Claim("a free diagonal beats relu", "diagonal", "prodial-free", "prodial"),
    Claim("training s helps", "train_scale", "prodial", "prodial-no-s"),
    Claim("larger blocks beat 1×1", "block_size", "prodial-blocks", "prodial"),
    Claim("larger blocks beat 1×1, free", "block_size", "prodial-free-blocks", "prodial-free"),
    Claim("training SSM parameters beside helps", "train_ssm", "prodial-ssm", "prodial"),
    Claim("α = 4 √r beats α = r", "lora_alpha", "rslora", "lora"),
)  # fmt: skip


def judged(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each claim's methods wherever cells have both.

    Args:
        cells: Of a leaderboard.

    Returns:
        For each claim and base with data: ``claim``, ``source``, ``better``, ``worse``, ``base``,
        ``pairs`` (a task, budget and seed each), ``difference`` (their mean, of accuracies) with
        ``error``, the standard error over pairs, and ``error_cells``, over tasks at a budget;
        ``won`` and ``lost`` (equals count for neither) with ``p`` of the sign test, ``p_flip`` by
        flipping signs; ``cells_won`` of ``cells`` (a task at a budget, mean over seeds) with
        ``p_cells`` of the sign test, for which tasks, not seeds, are the sample; ``by_task``, mean
        differences.
    """
    good = {
        (c["base"], c["method"], c["task"], c["budget"]): c for c in cells if c["status"] == "ok"
    }
    found = []
    for claim in CLAIMS:
        for base in sorted({key[0] for key in good}):
            by_cell: dict[tuple[str, str], list[float]] = {}
            for (b, method, task, budget), cell in good.items():
                other = good.get((base, claim.worse, task, budget))
                if b != base or method != claim.better or other is None:
                    continue
                seeds = sorted(cell["values"].keys() & other["values"].keys(), key=int)
                if seeds:
                    by_cell[task, budget] = [cell["values"][s] - other["values"][s] for s in seeds]
            if by_cell:
                found.append(_verdict(claim, base, by_cell))
    return found


def _verdict(
    claim: Claim, base: str, by_cell: dict[tuple[str, str], list[float]]
) -> dict[str, Any]:
    pairs = [d for differences in by_cell.values() for d in differences]
    means = [spread(differences)[0] for differences in by_cell.values()]
    by_task: dict[str, list[float]] = {}
    for (task, _), mean in zip(by_cell, means, strict=True):
        by_task.setdefault(task, []).append(mean)
    won, lost = (sum(sign * d > 1e-9 for d in pairs) for sign in (1, -1))
    cells_won, cells_lost = (sum(sign * d > 1e-9 for d in means) for sign in (1, -1))
    return {
        "claim": claim.text, "source": claim.source, "better": claim.better,
        "worse": claim.worse, "base": base, "pairs": len(pairs),
        "difference": round(spread(pairs)[0], 5), "error": _error(pairs),
        "error_cells": _error(means), "won": won, "lost": lost,
        "p": round(sign_test(won, lost), 6), "p_flip": round(sign_flip(pairs), 5),
        "cells": len(means), "cells_won": cells_won,
        "p_cells": round(sign_test(cells_won, cells_lost), 6),
        "by_task": {task: round(spread(values)[0], 5) for task, values in sorted(by_task.items())},
    }  # fmt: skip


def _error(values: Sequence[float]) -> float:
    """Of their mean."""
    return round(spread(values)[1] / math.sqrt(len(values)), 5)


def lines_of(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """The verdicts as a table in Markdown."""
    if not verdicts:
        return []
    lines = [
        "## Claims", "",
        "Differences of test accuracy in points, paired by task, budget and seed, with their "
        "standard error over tasks at a budget (means over seeds), which says more of other tasks "
        "than seeds do; p is two-sided, of the sign test over pairs, and over tasks.", "",
        "| claim | of | base | difference | pairs won : lost | p | tasks won | p |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for v in verdicts:
        lines.append(
            f"| {v['claim']} | {v['source']} | {v['base']} | {100 * v['difference']:+.2f} ± "
            f"{100 * v['error_cells']:.2f} | "
            f"{v['won']} : {v['lost']} | {v['p']:.4f} | {v['cells_won']} of {v['cells']} | "
            f"{v['p_cells']:.4f} |"
        )
    return [*lines, ""]
