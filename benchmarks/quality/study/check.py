"""Does every method run on this device? One short row of each, with its time and memory."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.quality.bases.shapes import load_base
from benchmarks.quality.study.row import Row, Spec, append
from benchmarks.quality.study.runner import Plan
from benchmarks.quality.study.train import data_of, run_row, where
from benchmarks.quality.tasks.task import load_task

__all__ = ["check"]


def check(
    plan: Plan,
    tasks: Path,
    folder: Path,
    *,
    device: torch.device,
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Sequence[Row]:
    """Run one row of every cell of a plan, at the second of its learning rates.

    Args:
        plan: Whose cells; its recipe should be a short one.
        tasks: Folder of the tasks' files.
        folder: Gets ``check.jsonl``, which is no part of a study's rows.
        device: Where to run.
        seconds: No row begins after that.
        say: Is given a line per row.

    Returns:
        The rows: an error is a row with the status ``"failed"``.
    """
    start = time.monotonic()
    base = load_base(plan.base)
    base.model.to(device)
    rows: list[Row] = []
    for task, method, budget in plan.cells():
        if time.monotonic() - start > seconds:
            break
        data = data_of(base, load_task(tasks, task), plan.recipe, device)
        spec = Spec(base.name, task, method.name, budget, method.rates[1], 1, plan.recipe)
        begun = time.monotonic()
        try:
            row = run_row(base, data, spec, "sweep", device)
        except Exception as error:
            traceback.print_exc()
            row = Row(spec, "sweep", "failed", where=where(device), note=f"{error!r}"[:300])
        append(folder / "check.jsonl", row)
        rows.append(row)
        figures = row.figures
        per_step = 1e3 * figures.get("seconds", 0.0) / max(1, plan.recipe.steps)
        say(
            f"{method.name:20} {budget:7} {row.status:8} {figures.get('parameters', 0):>10,} "
            f"{per_step:8.1f} ms a step  {(figures.get('peak_bytes') or 0) / 2**20:8.0f} MiB  "
            f"loss {figures.get('loss')}  {time.monotonic() - begun:5.1f} s in all  {row.note}"
        )
    return rows
