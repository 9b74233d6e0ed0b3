"""Several GPUs: the same gradients, the same run, and how it scales.

``python -m benchmarks.distributed`` starts one process for each of two GPUs and takes

* ``gradients``: every adapter gradient of Mamba-1, Mamba-2 and a hybrid, 8 × 512 tokens, on two
  GPUs in every way there is, beside one GPU that accumulates the same two halves; and what another
  order of sums changes on one GPU. In units of 2⁻²³ of a gradient's norm, the farthest of all;
* ``runs``: ``prodial finetune`` on one GPU, twice, and by ``torchrun`` on two; a run on two whose
  second process is killed, resumed on two and on one;
* ``scaling``: tokens a second of Mamba-1.4B and of Nemotron-H-8B's dimensions, 4 × 2048 tokens a
  GPU, and of the latter under FSDP2 (``--shard``).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks import targets  # noqa: E402
from benchmarks.harness.environment import ROOT, describe, device_name  # noqa: E402
from benchmarks.harness.store import json_text, results_of, write_text  # noqa: E402

PARTS = ("gradients", "runs", "scaling")
SIZE = 2
SECONDS = 240.0
_TIMED = ("seconds", "tokens_per_second")
Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order (all)")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU, to try it out")
    parser.add_argument("--model", default="embedded", help="what the runs train (embedded)")
    parser.add_argument("--output", type=Path, help="folder of distributed.json (the device's)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and store; 1 where something is not as it must be."""
    args = build_parser().parse_args(argv)
    if not args.tiny and torch.cuda.device_count() < SIZE:
        print(f"this needs {SIZE} GPUs, here are {torch.cuda.device_count()}", file=sys.stderr)
        return 2
    device = "cpu" if args.tiny else "cuda"
    folder = args.output or results_of(device_name(device))
    words = sys.argv[1:] if argv is None else list(argv)
    record: Row = {
        **describe(device, shlex.join(["python", "-m", "benchmarks.distributed", *words])),
        "processes": SIZE, "rows": [],
    }  # fmt: skip
    for part in args.parts.split(","):
        started = time.perf_counter()
        rows = runs(args.model, args.tiny) if part == "runs" else measured(part, args.tiny)
        add_ratios(rows)
        record["rows"] += rows
        # Whatever comes later, this is kept.
        write_text(folder / "distributed.json", json_text(record))
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    print(table(record["rows"]))
    failures = failed(record["rows"])
    print("\n".join(failures) or "all as it must be")
    return 1 if failures else 0


def measured(part: str, tiny: bool) -> list[Row]:
    """Rows of a part that the processes measure themselves."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        words = ["-m", "benchmarks.training.processes", part, str(file)]
        started = [
            subprocess.Popen(
                [sys.executable, *words, *(["--tiny"] if tiny else [])], cwd=ROOT, env=environment
            )
            for environment in environments()
        ]
        try:
            ended = [process.wait(timeout=SECONDS) for process in started]
        except subprocess.TimeoutExpired:
            ended = [-1]
        finally:
            for process in started:
                process.kill()
        lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return [
        *rows,
        *([{"part": part, "error": f"processes ended with {ended}"}] if any(ended) else []),
    ]


def environments(size: int = SIZE) -> list[dict[str, str]]:
    """What a launcher sets for each process on this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    return [
        {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MAMBA_DETERMINISTIC": "1",
        }
        for rank in range(size)
    ]  # fmt: skip


# Runs


def runs(model: str, tiny: bool) -> list[Row]:
    """Rows of ``prodial finetune`` on one and on two GPUs, whole and interrupted."""
    with TemporaryDirectory() as folder:
        try:
            return _Runs(Path(folder), model, tiny).rows()
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            return [{"part": "runs", "error": f"{type(error).__name__}: {error}"}]


class _Runs:
    def __init__(self, folder: Path, model: str, tiny: bool) -> None:
        self.folder = folder
        steps, sequences, length, tokens = (6, 1, 32, 64) if tiny else (60, 4, 256, 4096)
        self.kill_at = 4 if tiny else 35
        self.options = [
            "--model", model, "--steps", str(steps), "--batch-size", str(sequences),
            "--seq-len", str(length), "--eval-every", "0", "--eval-tokens", str(tokens),
            "--max-bytes", "400000", "--warmup", "4", "--lr", "0.003",
            "--save-every", "2" if tiny else "10", "--device", "cpu" if tiny else "cuda",
        ]  # fmt: skip

    def rows(self) -> list[Row]:
        one, again = (self.start(name, gpu) for gpu, name in enumerate(("one", "again")))
        for process in (one, again):
            _end(process)
        launch = ["--nproc-per-node", str(SIZE), "--master-addr", "127.0.0.1", "--master-port"]
        port = environments()[0]["MASTER_PORT"]
        command = [
            sys.executable, "-m", "torch.distributed.run", *launch, port, "-m", "prodial_kernels",
            *self.command("two"),
        ]  # fmt: skip
        _end(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "MAMBA_DETERMINISTIC": "1"}))
        pair = [self.start_of_two("killed", place) for place in environments()]
        self.kill(pair[1], "killed")
        first = pair[0].wait(timeout=SECONDS)
        shutil.copytree(self.folder / "killed", self.folder / "on_one")
        pair = [self.start_of_two("killed", place, "--resume") for place in environments()]
        for process in pair:
            _end(process)
        _end(self.start("on_one", 0, "--resume"))
        whole = self.losses("one")
        rows: list[Row] = [
            {"part": "runs", "what": what, **compared(self.losses(name), right)}
            for what, name, right in (
                ("one GPU, again", "again", whole),
                ("torchrun, two GPUs", "two", whole),
                ("killed, resumed on two, beside two", "killed", self.losses("two")),
                ("killed, resumed on one, beside two", "on_one", self.losses("two")),
            )
        ]
        rows[2]["exit of the process that was left"] = first
        return rows

    def command(self, name: str, *more: str) -> list[str]:
        output = ["--output", str(self.folder / name)]
        return ["finetune", *(more or [*self.options, "--grad-accumulation", "2"]), *output]

    def start(self, name: str, gpu: int, *more: str) -> subprocess.Popen[bytes]:
        place = {"CUDA_VISIBLE_DEVICES": str(gpu), "MAMBA_DETERMINISTIC": "1"}
        words = [sys.executable, "-m", "prodial_kernels", *self.command(name, *more)]
        return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **place})

    def start_of_two(
        self, name: str, environment: Mapping[str, str], *more: str
    ) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "prodial_kernels", *self.command(name, *more)]
        return subprocess.Popen(words, cwd=ROOT, env=environment)

    def kill(self, process: subprocess.Popen[bytes], name: str) -> None:
        file = self.folder / name / "metrics.jsonl"
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if file.exists() and f'"step": {self.kill_at},' in file.read_text():
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def losses(self, name: str) -> list[Row]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in _TIMED} for line in lines]


def compared(found: Sequence[Row], right: Sequence[Row]) -> Row:
    """How far the losses of two runs are apart, relative, and whether every figure is equal."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, right, strict=True)]
    far = [abs(a - b) / abs(b) for a, b in pairs]
    return {"farthest_loss": max(far), "last_loss": far[-1], "equal": list(found) == list(right)}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.wait(timeout=SECONDS):
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")


# Judging


def failed(rows: Sequence[Row]) -> list[str]:
    """What is not as it must be, in words."""
    said = [f"{row['part']}: {row['error']}" for row in rows if "error" in row]
    gradients = [row for row in rows if row["part"] == "gradients" and "way" in row]
    for row in gradients:
        same = [r for r in gradients if all(r[k] == row[k] for k in ("model", "dtype", "base"))]
        noise = max((r["ulps"] for r in same if r["way"].startswith("one GPU")), default=0.0)
        # A few roundings of a sum where nothing else differs.
        most = max(targets.GRADIENT_ULPS, 2 * noise)
        if not row["ulps"] <= most:
            said.append(f"{row['model']} {row['dtype']} {row['way']}: {row['ulps']:.3g} ulps")
    for row in rows:
        if row.get("over_one", targets.OVER_ONE_ON_TWO) < targets.OVER_ONE_ON_TWO:
            said.append(f"{row['model']}: {row['over_one']:.2f} times one GPU's tokens/s")
    runs_of = {row["what"]: row for row in rows if row["part"] == "runs" and "what" in row}
    if runs_of:
        noise = runs_of["one GPU, again"]["farthest_loss"]
        for what, row in runs_of.items():
            if row["farthest_loss"] > max(targets.LOSS_OF_TWO, 2 * noise):
                said.append(f"{what}: losses {row['farthest_loss']:.2g} apart")
    return said


def add_ratios(rows: Sequence[Row]) -> None:
    """Say of rows of several GPUs how many times the tokens/s of one they have."""
    alone = {row["model"]: row for row in rows if row.get("processes") == 1}
    for row in rows:
        if row.get("processes", 1) > 1 and row["model"] in alone:
            one = alone[row["model"]]["tokens_per_second"]
            row["over_one"] = row["tokens_per_second"] / one


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    lines: list[str] = []
    for row in rows:
        if "error" in row:
            lines.append(f"{row['part']}: {row['error']}")
        elif row["part"] == "gradients":
            lines.append(
                f"{row['model']:11} {row['dtype']:9} {row['base']:6} {row['way']:32} "
                f"{row['ulps']:10.3g} {row['median_ulps']:10.3g} "
                f"{row['equal']:3}/{row['parameters']} equal"
            )
        elif row["part"] == "runs":
            lines.append(
                f"{row['what']:36} losses {row['farthest_loss']:.2g} apart, "
                f"{'every figure equal' if row['equal'] else 'not bit-equal'}"
            )
        else:
            times = f", {row['over_one']:.2f}×" if "over_one" in row else ""
            lines.append(
                f"{row['model']:14} {row['processes']} {'shard' if row['shard'] else '     '} "
                f"{row['ms']:8.1f} ms {row['tokens_per_second']:10,.0f} tokens/s "
                f"{row['peak_gb']:.1f} GB{times}"
                + (
                    f", NCCL {row['nccl_ms']:.0f} ms, {row['nccl_beside_others_ms']:.0f} of it "
                    "beside other kernels"
                    if "nccl_ms" in row
                    else ""
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
