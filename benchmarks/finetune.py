"""How small and how fast fine-tuning gets: whole steps, loss and optimiser included.

``python -m benchmarks.finetune`` measures every job of ``finetune_jobs.py`` on a GPU, each in a
process of its own, so that a peak is that job's alone. All processes load their libraries at once
and then take the device in turn. ``--curves`` compares loss curves with and without each saving
instead (``curves.py``). Exit code 1 where a job fails or misses what it must keep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
_RESULT = "RESULT "


class Child:
    """A process that measures one job when it is told to."""

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

    def measure(self) -> dict[str, Any]:
        """Let it measure; wait for the row."""
        output, _ = self._process.communicate("go\n")
        for line in output.splitlines():
            if line.startswith(_RESULT):
                row: dict[str, Any] = json.loads(line.removeprefix(_RESULT))
                return row
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return {"error": f"exit code {self._process.returncode}: {' / '.join(lines[-3:])}"}

    def end(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def be_child(options: argparse.Namespace) -> int:
    """Load everything, wait for the word, measure one job."""
    from benchmarks.finetune_jobs import JOBS, MORE_JOBS, TINY_JOBS, measure

    job = next(job for job in (*JOBS, *MORE_JOBS, *TINY_JOBS) if job.name == options.child)
    # transformers runs mamba_ssm's kernels too.
    if not options.tiny:
        import mamba_ssm  # noqa: F401
    import transformers  # noqa: F401

    sys.stdin.readline()
    device = "cpu" if options.tiny else "cuda"
    row = measure(
        job, device, steps=options.steps, loss=options.loss, optimizer=options.optimizer,
        profile=options.profile,
    )  # fmt: skip
    print(_RESULT + json.dumps(row), flush=True)
    return 0


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['name']:14} FAILED: {row['error']}"
    from benchmarks.finetune_jobs import GB, keeps

    def limits(values: Sequence[float | None]) -> str:
        ms, gb = ("–" if value is None else f"{value:g}" for value in values)
        return f"{ms:>5} ms {gb:>4} GB"

    peak = "        –" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GB:6.2f} GB"
    gib = "" if row["peak_bytes"] is None else f" ({row['peak_bytes'] / 2**30:5.2f} GiB)"
    limited = any(value is not None for value in row["must"])
    kept = "ok" if keeps(row, row["must"]) else "MISSED"
    if kept == "ok" and keeps(row, row["aim"]):
        kept = "aim"
    return (
        f"{row['name']:14} {row['title']:28} {row['ms']:9.2f} ms {peak}{gib}  "
        f"must {limits(row['must'])}  aim {limits(row['aim'])}  "
        f"{kept if limited else '':6} {row['library']}, {row['how']}"
    )


def kernels_text(row: dict[str, Any], top: int = 30) -> str:
    """The kernels of one step, by time, beside the time of the whole step."""
    kernels = row["kernels_us"]
    times = {"a step, by the clock": row["ms"] * 1e3, "all kernels": sum(kernels.values())}
    times |= dict(list(kernels.items())[:top])
    return "\n".join(f"  {us / 1e3:9.3f}  {name}" for name, us in times.items())


def run_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the chosen jobs, one after the other."""
    from benchmarks.finetune_jobs import JOBS, MORE_JOBS, TINY_JOBS

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
        for name, child in children.items():
            row = {"name": name, **child.measure()}
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
        from benchmarks.curves import MAKERS, run_curves

        if unknown := set(options.jobs or ()) - MAKERS.keys():
            raise SystemExit(f"benchmarks.finetune: unknown models {sorted(unknown)}: {[*MAKERS]}")
        rows, good = run_curves("cpu" if options.tiny else "cuda", options.steps, options.jobs)
    else:
        from benchmarks.finetune_jobs import keeps

        rows = run_jobs(options)
        good = all("error" not in row and keeps(row, row["must"]) for row in rows)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        command = " ".join(["python -m benchmarks.finetune", *(arguments or sys.argv[1:])])
        name = "curves.json" if options.curves else "finetune.json"
        write(rows, options.output / name, command, "cpu" if options.tiny else "cuda")
    return 0 if good else 1


def write(rows: Sequence[dict[str, Any]], path: Path, command: str, device: str) -> None:
    """Write the rows with what they were measured on."""
    from benchmarks.environment import describe

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**describe(device, command), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
