"""How small and how fast fine-tuning gets: whole steps, loss and optimiser included.

``python -m benchmarks.finetune`` measures every job of ``finetune_jobs.py`` on a GPU, each in a
process of its own, so that a peak and a limit are that job's alone. Some processes at a time build
their models and compile side by side; then each takes the device in turn. ``--curves`` compares
loss curves with and without each saving instead (``curves.py``). Exit code 1 where a job fails or
misses what it must keep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
_READY, _RESULT = "READY", "RESULT "
# The first jobs together are given 54 GB, contexts not counted.
SIDE_BY_SIDE = 8
# Of the curves, whose steps leave a GPU idle most of the time.
WORKERS = 4


class Child:
    """A process that prepares one job, and measures it, when it is told to."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        # Kernels that libraries tune are tuned once per machine, not once per process.
        environment.setdefault("TRITON_CACHE_AUTOTUNING", "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.finetune", *arguments],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors,
        )  # fmt: skip

    def prepare(self) -> None:
        """Let it build its model and take the first steps; return at once."""
        self._tell("prepare")

    def wait(self) -> None:
        """Wait until it has, or has failed."""
        self._line(_READY)

    def measure(self) -> dict[str, Any]:
        """Let it measure; wait for the row."""
        self._tell("measure")
        line = self._line(_RESULT)
        if line is not None:
            row: dict[str, Any] = json.loads(line.removeprefix(_RESULT))
            return row
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return {"error": f"exit code {code}: {' / '.join(lines[-3:])}"}

    def end(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _tell(self, word: str) -> None:
        # One that has failed says so by its exit code.
        with contextlib.suppress(BrokenPipeError):
            print(word, file=self._process.stdin, flush=True)

    def _line(self, start: str) -> str | None:
        """The next line of its output that starts so; None where there is none."""
        return next((line for line in self._process.stdout or () if line.startswith(start)), None)


def be_child(options: argparse.Namespace) -> int:
    """Load everything; prepare one job and measure it, each at the word."""
    from benchmarks.training.jobs import JOBS, MORE_JOBS, TINY_JOBS
    from benchmarks.training.steps import prepared

    job = next(job for job in (*JOBS, *MORE_JOBS, *TINY_JOBS) if job.name == options.child)
    # transformers runs mamba_ssm's kernels too.
    if not options.tiny:
        import mamba_ssm  # noqa: F401
    import transformers  # noqa: F401

    sys.stdin.readline()
    device = "cpu" if options.tiny else "cuda"
    with prepared(job, device, loss=options.loss, optimizer=options.optimizer) as training:
        print(_READY, flush=True)
        sys.stdin.readline()
        row = training.measure(options.steps, profile=options.profile)
    print(_RESULT + json.dumps(row), flush=True)
    return 0


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['name']:15} FAILED: {row['error']}"
    from benchmarks.training.jobs import keeps
    from benchmarks.training.table import gigabytes, levels_text

    def limits(values: Sequence[float | None]) -> str:
        ms, gb = ("–" if value is None else f"{value:g}" for value in values)
        return f"{ms:>5} ms {gb:>4} GB"

    limited = any(value is not None for value in row["must"])
    kept = "ok" if keeps(row, row["must"]) else "MISSED"
    if kept == "ok" and keeps(row, row["aim"]) and any(row["aim"]):
        kept = "aim"
    elif not limited:
        kept = ""
    budget = f"budget {row['memory_budget']}, " if row["memory_budget"] else ""
    return (
        f"{row['name']:15} {row['title']:28} {row['ms']:9.2f} ms {gigabytes(row):>16}  "
        f"must {limits(row['must'])}  aim {limits(row['aim'])}  {kept:6} "
        f"{row['library']}, {budget}{levels_text(row['levels'])}; {row['how']}"
    )


def kernels_text(row: dict[str, Any], top: int = 30) -> str:
    """The kernels of one step, by time, beside the time of the whole step."""
    kernels = row["kernels_us"]
    times = {"a step, by the clock": row["ms"] * 1e3, "all kernels": sum(kernels.values())}
    times |= dict(list(kernels.items())[:top])
    return "\n".join(f"  {us / 1e3:9.3f}  {name}" for name, us in times.items())


def run_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the chosen jobs, one after the other; prepare some of them at once."""
    from benchmarks.training.jobs import JOBS, MORE_JOBS, TINY_JOBS

    known = TINY_JOBS if options.tiny else (*JOBS, *MORE_JOBS)
    names = options.jobs or [job.name for job in (TINY_JOBS if options.tiny else JOBS)]
    unknown = set(names) - {job.name for job in known}
    if unknown:
        listed = ", ".join(job.name for job in known)
        raise SystemExit(f"benchmarks.finetune: unknown jobs {sorted(unknown)}; known: {listed}")
    passed = ["--steps", str(options.steps), "--loss", options.loss]
    passed += ["--optimizer", options.optimizer, *(["--tiny"] if options.tiny else [])]
    passed += ["--profile"] if options.profile else []
    children = {name: Child(["--child", name, *passed]) for name in names}
    rows = []
    try:
        for first in range(0, len(names), options.side_by_side):
            wave = names[first : first + options.side_by_side]
            for name in wave:
                children[name].prepare()
            for name in wave:
                children[name].wait()
            for name in wave:
                row = {"name": name, **children[name].measure()}
                children.pop(name).end()
                rows.append(row)
                print(row_text(row), flush=True)
                if "kernels_us" in row:
                    print(kernels_text(row), flush=True)
    finally:
        for child in children.values():
            child.end()
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser("python -m benchmarks.finetune", description=__doc__)
    option = parser.add_argument
    option(
        "--jobs", nargs="+", metavar="NAME", help="only these, MORE_JOBS too; with --curves: models"
    )
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
    option("--child", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; return 1 if a job fails or misses what it must keep."""
    options = build_parser().parse_args(arguments)
    if options.steps is None:
        options.steps = (3 if options.tiny else 200) if options.curves else 10
    if options.child:
        return be_child(options)
    import torch

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
        rows, good = run_curves(
            "cpu" if options.tiny else "cuda", options.steps, options.jobs,
            workers=0 if options.tiny else WORKERS,
        )  # fmt: skip
    else:
        from benchmarks.training.jobs import keeps

        rows = run_jobs(options)
        good = all("error" not in row and keeps(row, row["must"]) for row in rows)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if "--output" in given:
            # Where it was written says nothing about the figures.
            del given[given.index("--output") : given.index("--output") + 2]
        command = " ".join(["python -m benchmarks.finetune", *given])
        name = "curves.json" if options.curves else "finetune.json"
        write(rows, options.output / name, command, "cpu" if options.tiny else "cuda")
    return 0 if good else 1


def write(rows: Sequence[dict[str, Any]], path: Path, command: str, device: str) -> None:
    """Write the rows with what they were measured on."""
    from benchmarks.harness.environment import describe

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(describe(device, command), rows))


def text_of(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON with a row in each line: of the curves, one holds hundreds of numbers."""
    lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps({**record}, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "rows": [\n    {lines}\n  ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
