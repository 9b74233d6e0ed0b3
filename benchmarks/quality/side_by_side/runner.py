"""Many rows of a plan, stacks of them at once: each task's sweeps, then its seeds; resumable."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.bases.shapes import Base, load_base
from benchmarks.quality.methods.method import Method, Unfit
from benchmarks.quality.side_by_side import mamba1, mamba2, vim
from benchmarks.quality.side_by_side.language import language_of
from benchmarks.quality.side_by_side.learner import Learner
from benchmarks.quality.side_by_side.stacked import weights_of
from benchmarks.quality.side_by_side.train import Member, Stack
from benchmarks.quality.side_by_side.vision import vision_of
from benchmarks.quality.side_by_side.weights import method_of
from benchmarks.quality.study.language import LanguageData
from benchmarks.quality.study.row import Row, Spec, append, finite, read_rows
from benchmarks.quality.study.runner import SWEEP_SEED, Plan, chosen_rate
from benchmarks.quality.study.train import data_of, where
from benchmarks.quality.study.vision import VisionData
from benchmarks.quality.tasks.task import ImageTask, load_task

__all__ = ["PRODUCTS", "run_stacks"]

PRODUCTS = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
_TOKENS = 131072  # of all runs of a stack, in a batch that is scored


class _Starts:
    """Adapted copies of the base, made by one thread while the device trains."""

    def __init__(self, model: Any) -> None:
        self._model = model
        # One: the random numbers of a start come from the process's generator.
        self._thread = ThreadPoolExecutor(1)
        self._made: dict[tuple[str, str, int, int | None], Future[Any]] = {}

    def ask(self, method: str, budget: str, seed: int, classes: int | None) -> Future[Any]:
        key = method, budget, seed, classes
        if key not in self._made:
            self._made[key] = self._thread.submit(method_of, self._model, *key)
        return self._made[key]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def _shape_of(base: Base) -> mamba1.Shape | mamba2.Shape | vim.Shape:
    if base.kind == "vision":
        return vim.shape_of(base.model)
    return (mamba1 if base.model.config.model_type == "mamba" else mamba2).shape_of(base.model)


class _Study:
    """What one call works with."""

    def __init__(
        self,
        plan: Plan,
        tasks: Path,
        folder: Path,
        device: torch.device,
        products: str,
        at_once: int,
        fused: bool,
    ) -> None:
        self.plan, self.tasks, self.device, self.at_once = plan, tasks, device, at_once
        self.base = load_base(plan.base)
        self.vision = self.base.kind == "vision"
        self.shape = _shape_of(self.base)
        self.mamba2 = isinstance(self.shape, mamba2.Shape)
        if products == "bfloat16" and not self.mamba2:
            raise ValueError(
                f"products: of {self.base.name} they are 'tf32' or 'float32', got 'bfloat16'"
            )
        self.fused = fused and self.mamba2 and device.type == "cuda"
        self.weights = {n: t.to(device) for n, t in weights_of(self.base.model).items()}
        self.starts = _Starts(self.base.model)
        self.done = {(row.spec.id, row.phase): row for row in read_rows(folder)}
        self.out = folder / f"rows-{self.base.name}-{plan.part[0]}of{plan.part[1]}.jsonl"
        self.products = products if device.type == "cuda" else "float32"
        self.where = {
            **where(device), "way": "side by side", "products": self.products,
            "between projectors": self._between(),
        }  # fmt: skip
        self.left_out: dict[str, str] = {}
        self.made = 0
        self.task = ""
        self._thread = ThreadPoolExecutor(1)
        self._prepared: dict[str, Future[Learner]] = {}
        self._classes: dict[str, int | None] = {}

    def _between(self) -> str:
        if not self.mamba2 and self.device.type == "cuda":
            return "mamba-ssm"
        return "Triton" if self.fused else "PyTorch"

    def classes(self, task: str) -> int | None:
        """Of a vision task."""
        if self.vision and task not in self._classes:
            found = load_task(self.tasks, task)
            self._classes[task] = len(found.classes) if isinstance(found, ImageTask) else None
        return self._classes.get(task)

    def prepare(self, task: str) -> None:
        """Have a task's tokens made, by a thread."""
        if task not in self._prepared:
            self._prepared[task] = self._thread.submit(self._learner, task)

    def _learner(self, name: str) -> Learner:
        """A task, still on the CPU: another thread's copies would break a graph's capture."""
        recipe = self.plan.recipe
        data = data_of(self.base, load_task(self.tasks, name), recipe, torch.device("cpu"))
        if isinstance(self.shape, vim.Shape):
            assert isinstance(data, VisionData)
            return vision_of(self.shape, data, recipe.limit)
        assert isinstance(data, LanguageData)
        return language_of(
            self.shape, data, recipe.limit, max(1, _TOKENS // self.at_once),
            dtype=PRODUCTS[self.products], fused=self.fused,
        )  # fmt: skip

    def take(self, task: str) -> None:
        """Put a task on the device."""
        if task != self.task:
            self.prepare(task)
            self.learner, self.task = self._prepared[task].result().to(self.device), task

    def close(self) -> None:
        """End the threads."""
        self.starts.close()
        self._thread.shutdown(cancel_futures=True)

    def keep(self, *rows: Row) -> None:
        append(self.out, *rows)
        self.done |= {(row.spec.id, row.phase): row for row in rows}
        self.made += len(rows)

    def members(self, specs: Sequence[Spec], phase: str) -> list[Member]:
        """The runs of specs that can be stacked; rows of methods that do not exist are made."""
        found = []
        for spec in specs:
            if spec.method in self.left_out:
                continue
            try:
                classes = self.classes(spec.task)
                asked = self.starts.ask(spec.method, spec.budget, spec.seed, classes)
                method, start = asked.result()
            except Unfit as error:
                self.keep(Row(spec, phase, "unfit", where=self.where, note=str(error)))
            except NotImplementedError as error:
                self.left_out[spec.method] = str(error)
            else:
                found.append(Member(spec, method, start))
        return found

    def run(self, specs: Sequence[Spec], phase: str) -> str:
        """Make the rows of one stack; return a line on it."""
        begun = time.perf_counter()
        members = self.members(specs, phase)
        if not members:
            return "nothing to stack"
        self.take(members[0].spec.task)
        gpu = self.device.type == "cuda"
        if gpu:
            _make_room(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        stack = Stack(self.learner, self.weights, members)
        ready = time.perf_counter()
        trained = stack.train()
        runs = len(stack.members)
        scores = {"validation": stack.accuracy("validation")}
        if phase == "final":
            scores["test"] = stack.accuracy("test")
        recipe = self.plan.recipe
        tokens = recipe.steps * recipe.batch_size * self.learner.length * runs
        rows = []
        for i, member in enumerate(stack.members):
            row = Row(member.spec, phase, where=self.where)
            row.figures |= {
                **member.start.figures,
                "loss": round(trained.losses[i], 5),
                "together": runs,
                "seconds": round(trained.seconds / runs, 4),
                "tokens_per_second": round(tokens / trained.seconds, 1),
            }
            if finite(row):
                row.figures |= {split: values[i] for split, values in scores.items()}
            rows.append(row)
        self.keep(*rows)
        took = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if gpu else 0.0
        return (
            f"{phase} {self.task}: {runs} rows in {took:.2f} s ({took / runs:.3f} a row): start "
            f"{ready - begun:.2f}, training {trained.seconds:.2f} "
            f"({1e3 * trained.step_seconds:.1f} ms a step, {tokens / trained.seconds:,.0f}"
            f" tokens/s), {peak:.1f} GiB"
        )


def _make_room(device: torch.device) -> None:
    """Give earlier stacks' memory back where it is much: no capture of a graph can."""
    _, total = torch.cuda.mem_get_info(device)
    if torch.cuda.memory_reserved(device) > total // 2:
        gc.collect()
        torch.cuda.empty_cache()


def _specs(study: _Study, cells: Sequence[tuple[str, Method, str]], phase: str) -> Iterator[Spec]:
    """The rows of a task's cells that are not there yet."""
    name, recipe = study.base.name, study.plan.recipe
    for task, method, budget in cells:
        trains = method.name != "none"
        rates = method.rates if trains else method.rates[:1]
        sweep = [Spec(name, task, method.name, budget, rate, SWEEP_SEED, recipe) for rate in rates]
        wanted = sweep
        if phase == "final":
            rows = [study.done[s.id, "sweep"] for s in sweep if (s.id, "sweep") in study.done]
            chosen = chosen_rate(rows)
            # A sweep that has only been begun chooses nothing.
            if chosen is None or len(rows) < len(rates):
                continue
            wanted = [
                Spec(name, task, method.name, budget, chosen[0], seed, recipe)
                for seed in range(1, (study.plan.seeds if trains else 1) + 1)
            ]
        elif any(
            row.status in ("unfit", "failed")
            for s in sweep
            if (row := study.done.get((s.id, "sweep"))) is not None
        ):
            continue
        yield from (spec for spec in wanted if (spec.id, phase) not in study.done)


def run_stacks(
    plan: Plan,
    tasks: Path,
    folder: Path,
    *,
    device: torch.device,
    at_once: int = 32,
    products: str = "tf32",
    fused: bool = True,
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Run what a folder of rows lacks, many rows at once; return how many rows were made.

    The rows are those of ``study/runner.py``, to rounding.

    Args:
        plan: What to run.
        tasks: Folder of the tasks' files.
        folder: Rows are read from all its ``rows*.jsonl`` and appended to one of this part's.
        device: Where to run.
        at_once: Most runs of a stack.
        products: One of :data:`PRODUCTS`: in what matrices are multiplied, on a GPU.
        fused: Compute what lies between projectors by the kernels of ``fused.py``, on a GPU.
        seconds: No stack begins that would, at the pace of the last one, end after that.
        say: Is given a line per stack.

    Raises:
        ValueError: The base is no Mamba-1, Mamba-2 or ``VisionMamba``, the task of the other
            kind, or products in bf16 are asked of another than Mamba-2.
    """
    begun = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = products == "tf32"
    study = _Study(plan, tasks, folder, device, products, at_once, fused)
    cells = plan.cells()
    pace = {"sweep": 0.0, "final": 0.0}  # seconds a row
    groups = _groups(cells)
    for group in groups:
        study.prepare(group[0][0])
        classes = study.classes(group[0][0])
        for seed in range(plan.seeds + 1):
            for _, method, budget in group:
                study.starts.ask(method.name, budget, seed, classes)
    try:
        for group in groups:
            for phase in ("sweep", "final"):
                wanted = list(_specs(study, group, phase))
                for part in _parts(wanted, at_once):
                    now = time.monotonic() - begun
                    if now + pace[phase] * len(part) > seconds:
                        return study.made
                    say(f"{now:6.1f} s: " + study.run(part, phase))
                    pace[phase] = (time.monotonic() - begun - now) / len(part)
    finally:
        study.close()
        for name, why in study.left_out.items():
            say(f"left out {name}: {why}")
    return study.made


def _parts(specs: Sequence[Spec], most: int) -> list[Sequence[Spec]]:
    """Specs in as few parts as can be, of about one size."""
    count = -(-len(specs) // most)
    edges = [i * len(specs) // count for i in range(count + 1)] if count else [0]
    return [specs[a:b] for a, b in itertools.pairwise(edges)]


def _groups(
    cells: Sequence[tuple[str, Method, str]],
) -> list[list[tuple[str, Method, str]]]:
    """Cells by task, with methods of one size beside the first budget's."""
    found: dict[tuple[str, str], list[tuple[str, Method, str]]] = {}
    first = next((budget for _, _, budget in cells if budget != "own"), "own")
    for task, method, budget in cells:
        found.setdefault((first if budget == "own" else budget, task), []).append(
            (task, method, budget)
        )
    return list(found.values())
