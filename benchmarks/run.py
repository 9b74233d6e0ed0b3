"""What does ProDiaL cost here, against everything one could use instead?

One command measures, prints tables, and writes JSON, CSV, Markdown and pictures:

    python -m benchmarks.run                    # everything, under six minutes
    python -m benchmarks.run --quick            # the table, ProDiaL against the strongest rivals
    python -m benchmarks.run --level step       # only whole training steps
    python -m benchmarks.run --base main        # and compare with another version
    python -m benchmarks.run --render           # pictures and README from saved results
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks import readme  # noqa: E402
from benchmarks.compare import (  # noqa: E402
    ComparisonError,
    checked_out,
    compare,
    comparison_table,
)
from benchmarks.harness import environment, store  # noqa: E402
from benchmarks.harness.pool import InProcess, WorkerPool  # noqa: E402
from benchmarks.jobs import LEVELS, Job, Wanted, plan  # noqa: E402
from benchmarks.projector.cases import GROUPS  # noqa: E402
from benchmarks.projector.roofline import Ceilings, CeilingsTask  # noqa: E402
from benchmarks.projector.shapes import MODELS  # noqa: E402
from benchmarks.report import report  # noqa: E402
from benchmarks.report.record import Record  # noqa: E402

BUDGET_S, QUICK_BUDGET_S = 350.0, 100.0
# Kept back for pictures and what ends the run.
CLOSING_S = 10.0
# Of the device's free memory; the rest is for what checking takes on top of it.
SHARE_OF_MEMORY = 0.5


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--level", choices=LEVELS, help="only one projector, mixer block or training step")
    option("--quick", action="store_true", help="the strongest rivals, fewer samples")
    option(
        "--scaling", action="store_true",
        help="only the sweeps over M, K and N, P, r; with --level step, over layers",
    )  # fmt: skip
    option("--model", help=f"shapes of one model: {', '.join(MODELS)}")
    option("--group", choices=GROUPS, help="shapes beside the table's, one projector each")
    option("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    option("--only", default="", help="rivals by name, separated by commas; the floor is added")
    option("--base", help="git reference, or folder with a prodial_kernels, to compare with")
    option(
        "--budget", type=float, metavar="SECONDS",
        help="drop the least important cases that do not fit; 0 for no limit "
        f"(default {BUDGET_S:.0f}, with --quick {QUICK_BUDGET_S:.0f})",
    )  # fmt: skip
    option("--workers", type=int, help="processes that compile (default: one less than CPUs)")
    option("--tiny", action="store_true", help="tiny shapes on a CPU: tries the suite out")
    option("--output", type=Path, help="folder for results (default benchmarks/results/<device>)")
    option("--print", dest="show", type=Path, metavar="JSON", help="print a saved result")
    option(
        "--render", nargs="*", type=Path, metavar="JSON",
        help="draw saved results and put them into README.md (default: all that are committed)",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what the options say.

    Returns:
        1 where a rival was refused or failed, or ProDiaL became slower than the base; 2 for options
        that cannot be followed.
    """
    started = time.monotonic()
    options = build_parser().parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.render is not None:
            return readme.render(options.render)
        if options.show:
            print(report.page(Record.read(options.show)))
            return 0
        return _run(options, given, started)
    except (ValueError, OSError, ComparisonError) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, arguments: list[str], started: float) -> int:
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, found none; --tiny tries the suite out on a CPU")
    if options.tiny and options.output is None:
        raise ValueError("--tiny needs --output: its figures are no results")
    wanted = Wanted(
        options.level, options.model, options.group, tuple(_names(options.only)), options.dtype,
        options.quick, options.scaling, options.tiny,
    )  # fmt: skip
    jobs = plan(wanted)
    device = "cpu" if options.tiny else "cuda"
    command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
    record = Record(
        _name(options), environment.describe(device, command), environment.clocks(),
        dropped=[str(job) for job in jobs],
        sweeps={size: list(cases) for size, cases in wanted.sweeps().items()},
    )  # fmt: skip
    folder = options.output or store.results_of(record.environment["device"])
    with ExitStack() as stack:
        # A reference that does not exist is found out before the measurement.
        base = stack.enter_context(checked_out(options.base)) if options.base else None
        try:
            _measure(options, jobs, device, record, folder, started)
        except (KeyboardInterrupt, SystemExit):
            print("\n" + report.summary(record), flush=True)
            raise
        if base is not None:
            start = time.monotonic()
            cases = wanted.cases()
            verdicts = compare(base, environment.ROOT, cases, device, 5 if options.tiny else 10)
            record.comparison = [{**asdict(v), "word": v.word} for v in verdicts]
            record.base = options.base
            record.seconds["compare"] = time.monotonic() - start
            print("\n" + comparison_table(verdicts, options.base), flush=True)
    record.clocks_after = environment.clocks()
    print("\n" + report.summary(record), flush=True)
    pictures = [] if options.quick else report.draw(record, folder)
    record.seconds["total"] = time.monotonic() - started
    print(*record.write(folder, report.page(record)), *pictures, sep="\n")
    statuses = [*(row.status for row in record.rows), *(row.status for row in record.modules)]
    if any(status.startswith(("refused", "failed")) for status in statuses):
        return 1
    return int(any(verdict["word"] == "slower" for verdict in record.comparison or ()))


def _measure(
    options: argparse.Namespace,
    jobs: list[Job],
    device: str,
    record: Record,
    folder: Path,
    started: float,
) -> None:
    """Do the jobs; after each, what there is is on disk."""
    budget = options.budget
    if budget is None:
        budget = QUICK_BUDGET_S if options.quick else BUDGET_S
    until = started + budget - CLOSING_S if budget > 0 else float("inf")
    if options.tiny and options.budget is None:
        until = float("inf")

    def take(job: Job | CeilingsTask, rows: Sequence[Any]) -> None:
        record.seconds.setdefault("prepare first", time.monotonic() - started)
        if isinstance(job, CeilingsTask):
            ceilings: Ceilings = rows[0]
            record.ceilings = ceilings if ceilings.status == "ok" else None
            print(report.ceilings_line(record) or ceilings.status, flush=True)
            return
        record.dropped.remove(str(job))
        record.add(job.part, rows)
        record.seconds["measure"] = time.monotonic() - started
        record.write(folder, report.page(record))
        if text := report.of_job(job.part, rows, quick=options.quick):
            print("\n" + text, flush=True)

    with _ended_by_signals(), _runner(options, len(jobs), device) as runner:
        runner.run([CeilingsTask(options.dtype), *jobs], until, take)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A time limit outside ends the run as an error does, and so its workers too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _runner(
    options: argparse.Namespace, jobs: int, device: str
) -> AbstractContextManager[InProcess[Job | CeilingsTask] | WorkerPool[Job | CeilingsTask]]:
    """Workers, or this process alone where there are none."""
    workers = options.workers
    if workers is None:
        workers = 0 if options.tiny else min(jobs, max(1, environment.cpu_count() - 1))
    if workers == 0:
        return nullcontext(InProcess(device))
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else 1 << 30
    return WorkerPool(workers, device, int(SHARE_OF_MEMORY * memory))


def _name(options: argparse.Namespace) -> str:
    """The stem of the result's files."""
    parts = [options.level, options.model, options.group]
    parts += [name for name in ("scaling", "quick") if getattr(options, name)]
    if options.only:
        parts.append("only")
    if options.dtype != "bfloat16":
        parts.append(options.dtype)
    return "-".join(part for part in parts if part) or "full"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main())
