"""Whole mamba_ssm models, adapted, against their own frozen fast path.

``python -m benchmarks.mixers`` measures backbone forward and backward of ``MambaLMHeadModel`` with
random weights of the published sizes, in bf16, with r = 16 adapters on ``in_proj`` and
``out_proj``: GPU time by CUDA-graph replay, and the allocator's peak with the weights. ``frozen``
is the floor: the fast path as mamba_ssm ships it, nothing trained. All need the gradient towards
the embedded tokens, so that every layer has a backward. A process of its own measures each model
at each shape; results are on disk after each.

Variants: ``prodial``; ``lora-slow`` is LoRA as people run it today, in plain PyTorch with the fast
path off; ``authors`` forms W' densely, in seconds a step, so only the first shape has it. Not
unless asked for: ``recompute`` keeps less; ``lora`` is LoRA in this package's block; MambaPEFT's
methods, each in the block and (``-slow``) with the fast path off (``models/methods.py``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks import targets  # noqa: E402
from benchmarks.harness.environment import cpu_count, describe  # noqa: E402
from benchmarks.harness.memory import release  # noqa: E402
from benchmarks.harness.pool import WorkerPool  # noqa: E402
from benchmarks.harness.profiling import kernels_of  # noqa: E402
from benchmarks.harness.store import results_of  # noqa: E402
from benchmarks.models.backbones import (  # noqa: E402
    BACKBONES,
    ModelCase,
    ModelJob,
    TuneJob,
    build,
    make_step,
)
from benchmarks.models.methods import METHOD_VARIANTS, METHODS  # noqa: E402
from benchmarks.models.rows import ModelRow, shapes_of, write_rows  # noqa: E402
from benchmarks.models.upstream import notes  # noqa: E402
from benchmarks.models.variants import VARIANTS, adapted  # noqa: E402

DEFAULT_VARIANTS = ("prodial", "lora-slow")
# Where the authors' formulation is measured too: elsewhere it takes half a minute.
WITH_AUTHORS = ("mamba-130m", 4, 512)
# Upstream's longest list.
CONFIGURATIONS = 11
BUDGET_S = 290.0
SHARE_OF_MEMORY = 0.75


def judge(row: ModelRow, device: str) -> None:
    """Hold the package's own variants to what they must keep on a ``device`` (its name)."""
    limits = None
    if row.variant in METHODS:
        limits = targets.METHOD.get(row.case)
    elif row.variant == "prodial":
        limits = targets.of_model(device).get(row.case)
    if limits is None or row.time_ratio is None or row.memory_ratio is None:
        row.judge([])
    else:
        kept = row.time_ratio <= limits[0] and row.memory_ratio <= limits[1]
        row.judge([(f"{limits[0]:.2f}x {limits[1]:.2f}x", kept)])


def cases_of(models: Sequence[str], shapes: Sequence[str] | None) -> list[ModelCase]:
    """The models at these shapes, or at those that have a target."""
    if shapes:
        return [ModelCase(name, *shape) for name in models for shape in shapes_of(shapes)]
    return [ModelCase(*case) for name in models for case in targets.MODEL_SHAPES if case[0] == name]


def plan(
    models: Sequence[str],
    shapes: Sequence[str] | None,
    variants: Sequence[str] | None,
    configurations: int,
) -> list[list[ModelJob | TuneJob]]:
    """Return the jobs: Mamba-1's beside what tunes Mamba-2's kernels, then Mamba-2's."""
    jobs: list[ModelJob] = []
    for case in cases_of(models, shapes):
        some = tuple(variants or DEFAULT_VARIANTS)
        if variants is None and (case.model, case.batch, case.length) == WITH_AUTHORS:
            some += ("authors",)
        jobs.append(ModelJob(case, ("frozen", *some), configurations))
    tunes = [
        TuneJob(ModelCase(name, 4, 512), number, configurations)
        for name in models
        if ModelCase(name, 4, 512).mamba2
        for number in range(configurations or CONFIGURATIONS)
    ]
    first = [job for job in jobs if not job.case.mamba2]
    return [[*first, *tunes], [job for job in jobs if job.case.mamba2]]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--output", type=Path, help="JSON (default benchmarks/results/<device>/mixers.json)")
    option("--models", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    option("--shapes", nargs="+", metavar="BxL", help="for example 4x512")
    option(
        "--variants",
        nargs="+",
        choices=(*VARIANTS[1:], *METHOD_VARIANTS),
        metavar="NAME",
        help="beside frozen: of " + ", ".join((*VARIANTS[1:], *METHOD_VARIANTS)),
    )
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
        for case in cases_of(options.models, options.shapes):
            print_profile(case, options.configurations)
        return 0
    command = " ".join(["python -m benchmarks.mixers", *(arguments or sys.argv[1:])])
    record = {**describe("cuda", command), "notes": notes(options.configurations)}
    output = options.output or results_of(record["device"]) / "mixers.json"
    rows: list[ModelRow] = []

    def take(job: ModelJob | TuneJob, measured: Sequence[ModelRow]) -> None:
        for row in measured:
            judge(row, record["device"])
            rows.append(row)
            print(row, flush=True)
        write_rows(output, record, rows)

    waves = plan(options.models, options.shapes, options.variants, options.configurations)
    free = torch.cuda.mem_get_info()[0]
    until = started + options.budget
    dropped: list[ModelJob | TuneJob] = []
    seats = min(max(map(len, waves)), max(1, cpu_count() - 1))
    pool = WorkerPool[ModelJob | TuneJob](seats, "cuda", int(SHARE_OF_MEMORY * free))
    with pool:
        for jobs in waves:
            dropped += pool.run(jobs, until, take)
    lost = [str(job) for job in dropped if isinstance(job, ModelJob)]
    if lost:
        print("dropped, as the time was over: " + "; ".join(lost))
    write_rows(output, {**record, "dropped": lost}, rows)
    print(f"{output}, {time.monotonic() - started:.0f} s")
    return 0 if rows and all(row.ok for row in rows) else 1


def print_profile(case: ModelCase, configurations: int = 0, top: int = 40) -> None:
    """Print the kernels of one adapted step beside those of the frozen one, by time."""
    model = build(case.model, configurations)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for variant in ("prodial", "frozen"):
        with adapted(model, variant):
            step = make_step(model, case.batch, case.length)
            found[variant] = {k.name: (k.us / 1e3, k.count) for k in kernels_of(step, "cuda")}
        release("cuda", workspaces=True)
    totals = {variant: sum(ms for ms, _ in times.values()) for variant, times in found.items()}
    print(f"{case.model} {case.batch}x{case.length}: ms (calls) of prodial, of frozen")
    print("  " + "  ".join(f"{total:8.3f} (   -)" for total in totals.values()) + "  all kernels")
    names = {kernel for times in found.values() for kernel in times}

    def largest(kernel: str) -> float:
        return -max(times.get(kernel, (0.0, 0))[0] for times in found.values())

    for kernel in sorted(names, key=largest)[:top]:
        cells = [found[v].get(kernel, (0.0, 0)) for v in ("prodial", "frozen")]
        columns = "  ".join(f"{ms:8.3f} ({calls:4.0f})" for ms, calls in cells)
        print(f"  {columns}  {kernel[:110]}")


if __name__ == "__main__":
    sys.exit(main())
