"""Many rows: each cell's sweep of learning rates, then its seeds; resumed wherever it ended."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.quality.bases.shapes import load_base
from benchmarks.quality.methods.budgets import BUDGETS
from benchmarks.quality.methods.method import Method
from benchmarks.quality.methods.registry import SETS, method_named
from benchmarks.quality.study.row import Recipe, Row, Spec, append, read_rows
from benchmarks.quality.study.train import Data, data_of, run_row, where
from benchmarks.quality.tasks.task import load_task

__all__ = ["SWEEP_SEED", "Plan", "chosen_rate", "run"]

SWEEP_SEED = 0
"""The seed of every sweep; the figures come from others, 1 and on."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        base: Folder of the base, or ``"embedded"``.
        tasks: Names.
        methods: Names of methods or of sets of them.
        budgets: For methods that take one.
        seeds: How many final rows a cell gets.
        recipe: See :class:`Recipe`.
        part: This process's number and how many there are: cells are dealt out among them.
    """

    base: str
    tasks: Sequence[str]
    methods: Sequence[str]
    budgets: Sequence[str] = tuple(BUDGETS)
    seeds: int = 5
    recipe: Recipe = field(default_factory=Recipe)
    part: tuple[int, int] = (0, 1)

    def cells(self) -> list[tuple[str, Method, str]]:
        """``(task, method, budget)``, the middle budget first, so that a part is of use."""
        names: list[str] = []
        for name in self.methods:
            names += [n for n in SETS.get(name, (name,)) if n not in names]
        methods = [method_named(name) for name in names]
        budgets = sorted(self.budgets, key=lambda b: (b != "medium", list(BUDGETS).index(b)))
        found = []
        for budget in [*budgets[:1], "own", *budgets[1:]]:
            for task in self.tasks:
                found += [
                    (task, method, budget)
                    for method in methods
                    if method.own_size == (budget == "own")
                ]
        return found[self.part[0] :: self.part[1]]


def chosen_rate(rows: Iterable[Row]) -> tuple[float, bool] | None:
    """The learning rate of the best validation accuracy, and whether it is the grid's edge.

    The smaller one of equals. None without a row that is ok.
    """
    good = [row for row in rows if row.status == "ok"]
    if not good:
        return None
    best = max(good, key=lambda row: (row.figures["validation"], -row.spec.learning_rate))
    rates = sorted(row.spec.learning_rate for row in good)
    return best.spec.learning_rate, best.spec.learning_rate in (rates[0], rates[-1])


def run(
    plan: Plan,
    tasks: Path,
    folder: Path,
    *,
    device: torch.device,
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Run what a folder of rows lacks; return how many rows were made.

    Args:
        plan: What to run.
        tasks: Folder of the tasks' files.
        folder: Rows are read from all its ``rows*.jsonl`` and appended to one of this part's.
        device: Where to run.
        seconds: No row begins after that.
        say: Is given a line per row.
    """
    start = time.monotonic()
    base = load_base(plan.base)
    base.model.to(device)
    done = {(row.spec.id, row.phase): row for row in read_rows(folder)}
    out = folder / f"rows-{base.name}-{plan.part[0]}of{plan.part[1]}.jsonl"
    held: dict[str, Data] = {}
    made = 0

    def row_of(spec: Spec, phase: str) -> Row | None:
        nonlocal made
        if (known := done.get((spec.id, phase))) is not None:
            return known
        if time.monotonic() - start > seconds:
            return None
        if spec.task not in held:
            held.clear()
            held[spec.task] = data_of(base, load_task(tasks, spec.task), plan.recipe, device)
        begun = time.monotonic()
        try:
            row = run_row(base, held[spec.task], spec, phase, device)
        except Exception as error:
            traceback.print_exc()
            row = Row(spec, phase, "failed", where=where(device), note=f"{error!r}"[:300])
        gc.collect()
        append(out, row)
        done[spec.id, phase] = row
        made += 1
        figures = {k: row.figures.get(k) for k in ("parameters", "loss", "validation", "test")}
        took = time.monotonic() - begun
        say(
            f"{phase} {' '.join(spec.cell)} lr {spec.learning_rate:g} seed {spec.seed} "
            f"{row.status} {figures} {took:.1f} s {row.note}"
        )
        return row

    for task, method, budget in plan.cells():
        trains = method.name != "none"
        rates = method.rates if trains else method.rates[:1]
        cell = (base.name, task, method.name, budget)
        sweep = []
        for rate in rates:
            if (row := row_of(Spec(*cell, rate, SWEEP_SEED, plan.recipe), "sweep")) is None:
                return made
            sweep.append(row)
            if row.status in ("unfit", "failed"):
                break
        if (chosen := chosen_rate(sweep)) is None:
            continue
        for seed in range(1, (plan.seeds if trains else 1) + 1):
            if row_of(Spec(*cell, chosen[0], seed, plan.recipe), "final") is None:
                return made
    return made
