"""How small and how fast fine-tuning gets: whole steps, loss and optimiser included.

``python -m benchmarks.finetune`` measures every job of ``finetune_jobs.py`` on a GPU, each in a
process of its own, so that a peak and a limit are that job's alone. Some processes at a time build
their models and compile side by side; then each takes the device in turn. ``--curves`` compares
loss curves with and without each saving instead (``learning/curves.py``), ``--fp8`` those on
products in fp8 and in 16 bits (``learning/in_fp8.py``). Exit code 1 where a job fails or
misses what it must keep.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks.harness.environment import describe  # noqa: E402
from benchmarks.harness.process import Worker, WorkerError  # noqa: E402
from benchmarks.harness.rows import values_of  # noqa: E402
from benchmarks.harness.store import write_text  # noqa: E402
from benchmarks.models.upstream import notes  # noqa: E402
from benchmarks.training.jobs import (  # noqa: E402
    CONFIGURATIONS,
    EVERY_JOB,
    JOBS,
    TINY_JOBS,
    JobRow,
    Limits,
)
from benchmarks.training.table import beside_rivals, gigabytes, levels_text  # noqa: E402

# The first jobs together are given 54 GB, contexts not counted.
SIDE_BY_SIDE = 8
# Seconds that are left for measuring each of those that are ready.
MEASURING = 3.0
# Of the curves, whose steps leave a GPU idle most of the time.
WORKERS = 4
# Of the runs in fp8, which take captured steps.
LEARNERS = 6


def row_text(row: JobRow) -> str:
    """One line of the table."""
    if row.error is not None:
        return f"{row.name:22} FAILED: {row.error}"

    def limits(values: Limits) -> str:
        ms, gb = ("–" if value is None else f"{value:g}" for value in values)
        return f"{ms:>5} ms {gb:>4} GB"

    kept = "MISSED" if not row.ok else "" if not any(row.must) else "ok"
    if row.ok and row.keeps(row.aim) and any(row.aim):
        kept = "aim"
    budget = f"budget {row.memory_budget}, " if row.memory_budget else ""
    return (
        f"{row.name:22} {row.title:28} {row.ms:9.2f} ms {gigabytes(row):>16}  "
        f"must {limits(row.must)}  aim {limits(row.aim)}  {kept:6} "
        f"{row.library}, {budget}{levels_text(row.levels)}; {row.how}"
    )


def kernels_text(row: JobRow, top: int = 30) -> str:
    """The kernels of one step, by time, beside the time of the whole step."""
    kernels = row.kernels_us or {}
    times = {"a step, by the clock": row.ms * 1e3, "all kernels": sum(kernels.values())}
    times |= dict(list(kernels.items())[:top])
    return "\n".join(f"  {us / 1e3:9.3f}  {name}" for name, us in times.items())


def run_jobs(
    options: argparse.Namespace,
    start: Callable[..., Worker],
    keep: Callable[[Sequence[JobRow]], None] = lambda rows: None,
) -> list[JobRow]:
    """Measure the chosen jobs, one after the other; prepare some of them at once.

    ``keep`` is called with all rows whenever there is another one.
    """
    # Loads transformers.
    from benchmarks.training.steps import JobTask

    known = {job.name: job for job in (TINY_JOBS if options.tiny else EVERY_JOB)}
    known |= {rival.name: rival for job in [*known.values()] for rival in job.rivals()}
    names = options.jobs or [job.name for job in (TINY_JOBS if options.tiny else JOBS)]
    if unknown := set(names) - known.keys():
        listed = ", ".join(known)
        raise SystemExit(f"benchmarks.finetune: unknown jobs {sorted(unknown)}; known: {listed}")
    if options.rivals:
        names = [each.name for name in names for each in (known[name], *known[name].rivals())]
    # transformers runs mamba_ssm's kernels too.
    load = ["transformers", "benchmarks.training.steps"]
    load = load if options.tiny else ["mamba_ssm", *load]
    device = "cpu" if options.tiny else "cuda"
    ends = time.monotonic() + (options.seconds or math.inf)
    workers: dict[str, Worker] = {}
    rows: list[JobRow] = []
    try:
        for first in range(0, len(names), options.side_by_side):
            wave = names[first : first + options.side_by_side]
            for name in wave:
                workers[name] = start(device, load=load)
            for name in wave:
                task = JobTask(
                    known[name], options.steps, options.loss, options.optimizer, options.profile
                )
                workers[name].ask("prepare", task=task)
            # A part of the time is for measuring them.
            until = ends - MEASURING * len(wave)
            failed = {name: _failure(workers[name], until) for name in wave}
            for name in wave:
                rows.append(_row(workers[name], name, failed[name], ends))
                _end(workers.pop(name))
                print(row_text(rows[-1]), flush=True)
                if rows[-1].kernels_us:
                    print(kernels_text(rows[-1]), flush=True)
                keep(rows)
    finally:
        for worker in workers.values():
            _end(worker)
    return rows


def _left(until: float) -> float | None:
    return None if until == math.inf else max(0.0, until - time.monotonic())


def _failure(worker: Worker, until: float) -> str | None:
    """Wait until a worker has prepared its job; return why it has not."""
    try:
        worker.prepared(_left(until))
    except WorkerError as error:
        return str(error)
    return None


def _row(worker: Worker, name: str, failure: str | None, ends: float) -> JobRow:
    """Let a worker measure the job that it prepared."""
    if failure is not None:
        return JobRow(name, error=failure)
    try:
        worker.ask("measure")
        row: JobRow = worker.answer(_left(ends))["rows"][0]
        return row
    except WorkerError as error:
        return JobRow(name, error=str(error))


def _end(worker: Worker) -> None:
    worker.kill()
    worker.close()


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser("python -m benchmarks.finetune", description=__doc__)
    option = parser.add_argument
    option(
        "--jobs",
        nargs="+",
        metavar="NAME",
        help="only these, in this order, MORE_JOBS and WHOLE_JOBS too; with --curves: models",
    )  # fmt: skip
    option(
        "--rivals", action="store_true",
        help="each job's model frozen and with PEFT's adapters too; one of them: NAME+peft",
    )  # fmt: skip
    option(
        "--seconds", type=float, metavar="S",
        help="leave out what is not ready in that time; with --fp8, what has not ended",
    )  # fmt: skip
    option("--output", type=Path, metavar="DIR", help="folder for the .json")
    option(
        "--steps", type=int, metavar="N",
        help="timed steps (10; with --curves 200, with --fp8 1000)",
    )  # fmt: skip
    option("--loss", default="auto", help="as of prodial finetune")
    option("--optimizer", default="adamw", help="as of prodial finetune")
    option(
        "--side-by-side", type=int, default=SIDE_BY_SIDE, metavar="N",
        help="jobs that are on the device at once, one of them running (%(default)s)",
    )  # fmt: skip
    option("--curves", action="store_true", help="compare loss curves instead")
    option("--fp8", action="store_true", help="compare learning in fp8 and in 16 bits instead")
    option("--seeds", type=int, default=5, metavar="N", help="with --fp8 (%(default)s)")
    option("--profile", action="store_true", help="print the kernels' times of a step too")
    option("--tiny", action="store_true", help="tiny models on a CPU: tries the suite out")
    return parser


def main(arguments: Sequence[str] | None = None, start: Callable[..., Worker] = Worker) -> int:
    """Measure, print, write; return 1 if a job fails or misses what it must keep.

    Args:
        arguments: The command's; None for those of the process.
        start: Starts the process that measures a job.
    """
    options = build_parser().parse_args(arguments)
    if options.steps is None:
        full = 200 if options.curves else 1000 if options.fp8 else 10
        options.steps = 3 if options.tiny and full > 10 else full
    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.finetune: needs a CUDA device, found none; or --tiny", file=sys.stderr)
        return 2
    started = time.perf_counter()
    device = "cpu" if options.tiny else "cuda"
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--output" in given:
        # Where it was written says nothing about the figures.
        del given[given.index("--output") : given.index("--output") + 2]
    command = " ".join(["python -m benchmarks.finetune", *given])
    record: dict[str, Any] = {}

    def keep(rows: Sequence[JobRow]) -> None:
        if options.output:
            if not record:
                record.update(describe(device, command))
                record["notes"] = [] if options.tiny else notes(CONFIGURATIONS)
            text = text_of(record, [values_of(row) for row in rows])
            write_text(options.output / "finetune.json", text)

    # One launch configuration per kernel of Mamba-2 instead of minutes of tuning; read when
    # mamba_ssm is imported, here and in the workers.
    if options.curves or options.fp8:
        os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
    if options.fp8:
        from benchmarks.training.learning.in_fp8 import LearningRow, run_learning

        record |= describe(device, command)

        def write(rows: Sequence[LearningRow]) -> None:
            if options.output:
                text = text_of(record, [values_of(row) for row in rows])
                write_text(options.output / "learning.json", text)

        good = run_learning(
            device, options.steps, options.seeds, seconds=options.seconds or 0.0,
            workers=0 if options.tiny else LEARNERS, keep=write,
        )[1]  # fmt: skip
    elif options.curves:
        from benchmarks.training.learning.curves import MAKERS, run_curves

        if unknown := set(options.jobs or ()) - MAKERS.keys():
            raise SystemExit(f"benchmarks.finetune: unknown models {sorted(unknown)}: {[*MAKERS]}")
        curves, good = run_curves(
            device, options.steps, options.jobs,
            workers=0 if options.tiny else WORKERS,
        )  # fmt: skip
        if options.output:
            rows = [values_of(curve) for curve in curves]
            record |= describe(device, command)
            write_text(options.output / "curves.json", text_of(record, rows))
    else:
        jobs = run_jobs(options, start, keep)
        good = all(job.ok for job in jobs)
        for line in beside_rivals(jobs):
            print(line)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if good else 1


def text_of(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON with a row in each line: of the curves, one holds hundreds of numbers."""
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps({**record}, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "rows": [\n    {lines}\n  ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
