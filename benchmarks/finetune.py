"""How small and how fast fine-tuning gets: whole steps, loss and optimiser included.

``python -m benchmarks.finetune`` measures every job of ``finetune_jobs.py`` on a GPU, each in a
process of its own, so that a peak and a limit are that job's alone. Some processes at a time build
their models and compile side by side; then each takes the device in turn. ``--curves`` compares
loss curves with and without each saving instead (``curves.py``). Exit code 1 where a job fails or
misses what it must keep.
"""

from __future__ import annotations

import argparse
import json
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
from benchmarks.training.jobs import (  # noqa: E402
    JOBS,
    MORE_JOBS,
    TINY_JOBS,
    WHOLE_JOBS,
    JobRow,
    Limits,
)
from benchmarks.training.table import gigabytes, levels_text  # noqa: E402

# The first jobs together are given 54 GB, contexts not counted.
SIDE_BY_SIDE = 8
# Of the curves, whose steps leave a GPU idle most of the time.
WORKERS = 4


def row_text(row: JobRow) -> str:
    """One line of the table."""
    if row.error is not None:
        return f"{row.name:15} FAILED: {row.error}"

    def limits(values: Limits) -> str:
        ms, gb = ("–" if value is None else f"{value:g}" for value in values)
        return f"{ms:>5} ms {gb:>4} GB"

    kept = "MISSED" if not row.ok else "" if not any(row.must) else "ok"
    if row.ok and row.keeps(row.aim) and any(row.aim):
        kept = "aim"
    budget = f"budget {row.memory_budget}, " if row.memory_budget else ""
    return (
        f"{row.name:15} {row.title:28} {row.ms:9.2f} ms {gigabytes(row):>16}  "
        f"must {limits(row.must)}  aim {limits(row.aim)}  {kept:6} "
        f"{row.library}, {budget}{levels_text(row.levels)}; {row.how}"
    )


def kernels_text(row: JobRow, top: int = 30) -> str:
    """The kernels of one step, by time, beside the time of the whole step."""
    kernels = row.kernels_us or {}
    times = {"a step, by the clock": row.ms * 1e3, "all kernels": sum(kernels.values())}
    times |= dict(list(kernels.items())[:top])
    return "\n".join(f"  {us / 1e3:9.3f}  {name}" for name, us in times.items())


def run_jobs(options: argparse.Namespace, start: Callable[..., Worker]) -> list[JobRow]:
    """Measure the chosen jobs, one after the other; prepare some of them at once."""
    # Loads transformers.
    from benchmarks.training.steps import JobTask

    by_name = TINY_JOBS if options.tiny else (*JOBS, *MORE_JOBS, *WHOLE_JOBS)
    known = {job.name: job for job in by_name}
    names = options.jobs or [job.name for job in (TINY_JOBS if options.tiny else JOBS)]
    if unknown := set(names) - known.keys():
        listed = ", ".join(known)
        raise SystemExit(f"benchmarks.finetune: unknown jobs {sorted(unknown)}; known: {listed}")
    # transformers runs mamba_ssm's kernels too.
    load = ["transformers", "benchmarks.training.steps"]
    load = load if options.tiny else ["mamba_ssm", *load]
    device = "cpu" if options.tiny else "cuda"
    workers = {name: start(device, load=load) for name in names}
    rows = []
    try:
        for first in range(0, len(names), options.side_by_side):
            wave = names[first : first + options.side_by_side]
            for name in wave:
                task = JobTask(
                    known[name], options.steps, options.loss, options.optimizer, options.profile
                )
                workers[name].ask("prepare", task=task)
            failed = {name: _failure(workers[name]) for name in wave}
            for name in wave:
                rows.append(_row(workers[name], name, failed[name]))
                _end(workers.pop(name))
                print(row_text(rows[-1]), flush=True)
                if rows[-1].kernels_us:
                    print(kernels_text(rows[-1]), flush=True)
    finally:
        for worker in workers.values():
            _end(worker)
    return rows


def _failure(worker: Worker) -> str | None:
    """Wait until a worker has prepared its job; return why it has not."""
    try:
        worker.prepared()
    except WorkerError as error:
        return str(error)
    return None


def _row(worker: Worker, name: str, failure: str | None) -> JobRow:
    """Let a worker measure the job that it prepared."""
    if failure is not None:
        return JobRow(name, error=failure)
    try:
        worker.ask("measure")
        row: JobRow = worker.answer()["rows"][0]
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
        help="only these, MORE_JOBS and WHOLE_JOBS too; with --curves: models",
    )  # fmt: skip
    option("--output", type=Path, metavar="DIR", help="folder for finetune.json or curves.json")
    option("--steps", type=int, metavar="N", help="timed steps (10; with --curves 200)")
    option("--loss", default="auto", help="as of prodial finetune")
    option("--optimizer", default="adamw", help="as of prodial finetune")
    option(
        "--side-by-side", type=int, default=SIDE_BY_SIDE, metavar="N",
        help="jobs that are on the device at once, one of them running (%(default)s)",
    )  # fmt: skip
    option("--curves", action="store_true", help="compare loss curves instead")
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
        options.steps = (3 if options.tiny else 200) if options.curves else 10
    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.finetune: needs a CUDA device, found none; or --tiny", file=sys.stderr)
        return 2
    started = time.perf_counter()
    if options.curves:
        # One launch configuration per kernel of Mamba-2 instead of minutes of tuning; read when
        # mamba_ssm is imported, here and in the workers.
        os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
        from benchmarks.training.curves import MAKERS, run_curves

        if unknown := set(options.jobs or ()) - MAKERS.keys():
            raise SystemExit(f"benchmarks.finetune: unknown models {sorted(unknown)}: {[*MAKERS]}")
        curves, good = run_curves(
            "cpu" if options.tiny else "cuda", options.steps, options.jobs,
            workers=0 if options.tiny else WORKERS,
        )  # fmt: skip
        rows = [values_of(curve) for curve in curves]
    else:
        jobs = run_jobs(options, start)
        good = all(job.ok for job in jobs)
        rows = [values_of(job) for job in jobs]
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if "--output" in given:
            # Where it was written says nothing about the figures.
            del given[given.index("--output") : given.index("--output") + 2]
        command = " ".join(["python -m benchmarks.finetune", *given])
        record = describe("cpu" if options.tiny else "cuda", command)
        name = "curves.json" if options.curves else "finetune.json"
        write_text(options.output / name, text_of(record, rows))
    return 0 if good else 1


def text_of(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON with a row in each line: of the curves, one holds hundreds of numbers."""
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps({**record}, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "rows": [\n    {lines}\n  ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
