"""Whole mamba_ssm models, adapted, against their own frozen fast path.

``python -m benchmarks.mixers`` measures backbone forward and backward of ``MambaLMHeadModel`` with
random weights of the published sizes, in bf16, with r = 16 adapters on ``in_proj`` and
``out_proj``: GPU time by CUDA-graph replay, and the allocator's peak with the weights. ``frozen``
is the floor: the fast path as mamba_ssm ships it, nothing trained. All need the gradient towards
the embedded tokens, so that every layer has a backward. A process of its own measures each model
at each shape; results are on disk after each.

Variants: ``prodial``; ``lora-slow`` is LoRA as people run it today, in plain PyTorch with the fast
path off; ``authors`` forms W' densely, in seconds a step, so only the first shape has it. Not
unless asked for: ``recompute`` keeps less; ``lora`` is LoRA in this package's block.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks.harness.crew import Crew  # noqa: E402
from benchmarks.harness.environment import cpu_count, describe, device_name, slug  # noqa: E402
from benchmarks.harness.store import RESULTS  # noqa: E402
from benchmarks.harness.task import Task  # noqa: E402
from benchmarks.models.backbones import (  # noqa: E402
    MODELS,
    ModelCase,
    ModelJob,
    TuneJob,
    build,
    make_step,
)
from benchmarks.models.variants import VARIANTS, adapted  # noqa: E402
from benchmarks.projector.measure import release  # noqa: E402

# (model, batch, length): what time and memory must not exceed, as multiples of the floor.
MUST = {
    ("mamba-130m", 4, 512): (1.25, 1.10),
    ("mamba-130m", 8, 2048): (1.20, 1.10),
    ("mamba-1.4b", 4, 512): (1.15, 1.10),
    ("mamba-1.4b", 4, 2048): (1.15, 1.10),
    ("mamba2-130m", 4, 512): (1.25, 1.10),
    ("mamba2-130m", 4, 2048): (1.20, 1.10),
    ("mamba2-1.3b", 4, 512): (1.15, 1.10),
    ("mamba2-1.3b", 4, 2048): (1.15, 1.10),
}
DEFAULT_VARIANTS = ("prodial", "lora-slow")
# Where the authors' formulation is measured too: elsewhere it takes half a minute.
WITH_AUTHORS = ("mamba-130m", 4, 512)
# Upstream's longest list.
CONFIGURATIONS = 11
BUDGET_S = 290.0
SHARE_OF_MEMORY = 0.75


@dataclass(frozen=True)
class Row:
    """One variant of one model at one shape; ratios are to ``frozen`` of the same shape."""

    model: str
    batch: int
    length: int
    variant: str
    status: str = "ok"
    ms: float | None = None
    mib: float | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None

    @property
    def must(self) -> tuple[float, float] | None:
        """Largest allowed ratios of time and memory; None for a rival."""
        limits = MUST.get((self.model, self.batch, self.length))
        return limits if self.variant == "prodial" else None

    @property
    def ok(self) -> bool:
        """Whether it was measured, and the ratios are within ``must``."""
        if self.status != "ok":
            return self.status.startswith("unavailable")
        if self.must is None or self.time_ratio is None or self.memory_ratio is None:
            return True
        return self.time_ratio <= self.must[0] and self.memory_ratio <= self.must[1]

    def __str__(self) -> str:
        head = f"{self.model:12} {f'{self.batch}x{self.length}':>7} {self.variant:>9}"
        if self.status != "ok" or self.ms is None or self.mib is None:
            return f"{head} {self.status}"
        text = f"{head} {self.ms:9.2f} ms {self.mib:9,.0f} MiB"
        if self.time_ratio is not None and self.memory_ratio is not None:
            text += f"  {self.time_ratio:5.2f}x {self.memory_ratio:5.2f}x"
        if self.must is not None:
            verdict = "ok" if self.ok else "MISSED"
            text += f"  must {self.must[0]:.2f}x {self.must[1]:.2f}x  {verdict}"
        return text


def shapes_of(name: str, wanted: Sequence[str] | None) -> list[tuple[int, int]]:
    """Return the (batch, length) that are measured for a model."""
    known = [(batch, length) for model, batch, length in MUST if model == name]
    if not wanted:
        return known
    return [(int(batch), int(length)) for batch, length in (w.split("x") for w in wanted)]


def plan(
    models: Sequence[str],
    shapes: Sequence[str] | None,
    variants: Sequence[str] | None,
    configurations: int,
) -> list[list[Task]]:
    """Return the jobs: Mamba-1's beside what tunes Mamba-2's kernels, then Mamba-2's."""
    first: list[Task] = []
    tunes: list[Task] = []
    second: list[Task] = []
    for name in models:
        jobs = second if MODELS[name][2] == "Mamba2" else first
        for batch, length in shapes_of(name, shapes):
            some = tuple(variants or DEFAULT_VARIANTS)
            if variants is None and (name, batch, length) == WITH_AUTHORS:
                some += ("authors",)
            case = ModelCase(name, batch, length)
            jobs.append(ModelJob(case, ("frozen", *some), configurations))
        if jobs is second:
            count = configurations or CONFIGURATIONS
            case = ModelCase(name, 4, 512)
            tunes += [TuneJob(case, number, configurations) for number in range(count)]
    return [[*first, *tunes], second]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--output", type=Path, help="JSON (default benchmarks/results/<device>/mixers.json)")
    option("--models", nargs="+", choices=MODELS, default=list(MODELS))
    option("--shapes", nargs="+", metavar="BxL", help="for example 4x512")
    option("--variants", nargs="+", choices=VARIANTS[1:], help="beside frozen")
    option(
        "--configurations", type=int, default=0, metavar="N",
        help="let upstream's Mamba-2 kernels, of the floor and of all, choose among N of theirs",
    )  # fmt: skip
    option("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="then drop the rest")
    option("--profile", action="store_true", help="print kernel times of a step instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write it as JSON; return 1 if a row misses what it must keep."""
    started = time.monotonic()
    options = build_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.mixers: needs a CUDA device, found none", file=sys.stderr)
        return 2
    if options.profile:
        for name in options.models:
            for batch, length in shapes_of(name, options.shapes):
                print_profile(name, batch, length, options.configurations)
        return 0
    command = " ".join(["python -m benchmarks.mixers", *(arguments or sys.argv[1:])])
    output = options.output or RESULTS / slug(device_name("cuda")) / "mixers.json"
    record = {**describe("cuda", command), "notes": notes(options.configurations)}
    rows: list[Row] = []

    def take(job: Task, measured: list[dict[str, Any]]) -> None:
        for values in measured:
            rows.append(Row(**values))
            print(rows[-1], flush=True)
        write(record, rows, output)

    waves = plan(options.models, options.shapes, options.variants, options.configurations)
    free = torch.cuda.mem_get_info()[0]
    until = started + options.budget
    dropped: list[Task] = []
    seats = min(max(map(len, waves)), max(1, cpu_count() - 1))
    with Crew(seats, "cuda", int(SHARE_OF_MEMORY * free)) as crew:
        for jobs in waves:
            dropped += crew.run(jobs, until, take)
    lost = [str(job) for job in dropped if job.part == "model"]
    if lost:
        print("dropped, as the time was over: " + "; ".join(lost))
    write({**record, "dropped": lost}, rows, output)
    print(f"{output}, {time.monotonic() - started:.0f} s")
    return 0 if rows and all(row.ok for row in rows) else 1


def notes(configurations: int) -> list[str]:
    """What a reader of the result must know."""
    if configurations == 0:
        return []
    return [
        f"Upstream's Mamba-2 kernels chose among {configurations} of their configurations, in the "
        "floor and everywhere."
    ]


def write(record: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Write the rows with what they were measured on; whole at any time."""
    data = {**record, "rows": [{**vars(row), "must": row.must, "ok": row.ok} for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(data, indent=2) + "\n")
    unfinished.replace(path)


def kernel_times(step: Callable[[], None]) -> dict[str, tuple[float, int]]:
    """Return (ms, calls) of every kernel of one step."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / 1000, event.count)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }


def print_profile(
    name: str, batch: int, length: int, configurations: int = 0, top: int = 40
) -> None:
    """Print the kernels of one adapted step beside those of the frozen one, by time."""
    model = build(name, configurations)
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for variant in ("prodial", "frozen"):
        with adapted(model, variant):
            found[variant] = kernel_times(make_step(model, batch, length))
        release("cuda", workspaces=True)
    totals = {variant: sum(ms for ms, _ in times.values()) for variant, times in found.items()}
    print(f"{name} {batch}x{length}: ms (calls) of prodial, of frozen")
    print("  " + "  ".join(f"{total:8.3f} (   -)" for total in totals.values()) + "  all kernels")
    names = {kernel for times in found.values() for kernel in times}

    def largest(kernel: str) -> float:
        return -max(times.get(kernel, (0.0, 0))[0] for times in found.values())

    for kernel in sorted(names, key=largest)[:top]:
        cells = [found[v].get(kernel, (0.0, 0)) for v in ("prodial", "frozen")]
        columns = "  ".join(f"{ms:8.3f} ({calls:4d})" for ms, calls in cells)
        print(f"  {columns}  {kernel[:110]}")


if __name__ == "__main__":
    sys.exit(main())
