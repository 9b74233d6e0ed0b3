"""Several GPUs: the same gradients, the same run, and how it scales.

``python -m benchmarks.distributed`` starts one process for each of two GPUs and takes

* ``gradients``: every adapter gradient of Mamba-1, Mamba-2 and a hybrid, 8 × 512 tokens, on two
  GPUs in every way there is, beside one GPU that accumulates the same two halves; and what another
  order of sums changes on one GPU. In units of 2⁻²³ of a gradient's norm, the farthest of all;
* ``runs``: ``prodial finetune`` on one GPU, twice, by ``torchrun`` on two, and with ``--shard``;
  runs on two whose first or second process is killed, resumed on two and on one;
* ``sharded``: tokens a second of Nemotron-H-8B's dimensions, 4 × 2048 tokens a GPU, with the frozen
  weights divided as ``--shard`` does it, in other ways, and by FSDP2, beside one GPU;
* ``scaling``: tokens a second of Mamba-1.4B and of Nemotron-H-8B's dimensions, whole on each GPU.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks import targets  # noqa: E402
from benchmarks.harness.environment import ROOT, describe, device_name  # noqa: E402
from benchmarks.harness.store import json_text, results_of, write_text  # noqa: E402
from benchmarks.training.shared_tables import place_of  # noqa: E402

PARTS = ("gradients", "runs", "sharded", "scaling")
# These take the time that processes need to start and to compile: most of a machine's cores rest.
UNTIMED = {"gradients", "runs"}
SIZE = 2
SECONDS = {"gradients": 110.0, "sharded": 110.0, "runs": 110.0, "scaling": 150.0}
"""That a part may take; what it has measured by then is kept."""
AGAIN = "one GPU, again"
KILLED = ("second killed", "first killed")
# Models whose gradients are taken side by side: starting and compiling take longer than computing.
TOGETHER = ("mamba", "mamba2", "nemotron_h")
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
    described = {
        **describe(device, shlex.join(["python", "-m", "benchmarks.distributed", *words])),
        "processes": SIZE,
    }  # fmt: skip
    taken: list[Row] = []
    for parts in batches(args.parts.split(",")):
        with ThreadPoolExecutor(len(parts)) as pool:
            done = {pool.submit(rows_of, part, args.model, args.tiny): part for part in parts}
            for future in as_completed(done):
                rows, took = future.result()
                add_ratios(rows)
                taken += rows
                # Whatever comes later, this is kept.
                store(folder / "distributed.json", done[future], {**described, "rows": rows})
                print(f"{done[future]}: {took:.0f} s", flush=True)
    print(table(taken))
    failures = failed(taken)
    print("\n".join(failures) or "all as it must be")
    return 1 if failures else 0


def store(file: Path, part: str, found: Row) -> None:
    """Put a part, with where it comes from, beside those that another command has measured."""
    before: Row = json.loads(file.read_text())["parts"] if file.exists() else {}
    parts = {**before, part: found}
    write_text(file, json_text({"parts": {name: parts[name] for name in PARTS if name in parts}}))


def batches(parts: Sequence[str]) -> list[list[str]]:
    """The parts in their order, those together that measure no time and follow on each other."""
    found: list[list[str]] = []
    for part in parts:
        if found and {part, *found[-1]} <= UNTIMED:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def rows_of(part: str, model: str, tiny: bool) -> tuple[list[Row], float]:
    """Rows of a part, and the seconds that it took."""
    started = time.perf_counter()
    rows = runs(model, tiny) if part == "runs" else measured(part, tiny)
    return rows, time.perf_counter() - started


def measured(part: str, tiny: bool) -> list[Row]:
    """Rows of a part that the processes measure themselves."""
    groups = TOGETHER if part == "gradients" and not tiny else ("",)
    with TemporaryDirectory() as folder:
        started = [
            _processes(part, cases, Path(folder) / f"{cases}.jsonl", tiny) for cases in groups
        ]
        deadline = time.monotonic() + seconds(part, tiny)
        ended = [[_ended(process, deadline) for process in group] for group in started]
        files = [Path(folder) / f"{cases}.jsonl" for cases in groups]
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    rows: list[Row] = [json.loads(line) for line in lines]
    for cases, codes in zip(groups, ended, strict=True):
        if any(codes):
            which = f" of {cases}" if cases else ""
            rows.append({"part": part, "error": f"processes{which} ended with {codes}"})
    return rows


def seconds(part: str, tiny: bool) -> float:
    """How long a part may take; a CPU of few cores takes all processes in turn."""
    return SECONDS[part] * (4.0 if tiny else 1.0)


def _processes(part: str, cases: str, file: Path, tiny: bool) -> list[subprocess.Popen[bytes]]:
    words = [sys.executable, "-m", "benchmarks.training.processes", part, str(file)]
    words += ["--cases", cases] if cases else []
    words += ["--tiny"] if tiny else []
    return [subprocess.Popen(words, cwd=ROOT, env=environment) for environment in environments()]


def _ended(process: subprocess.Popen[bytes], deadline: float) -> int | str:
    """How a process ended; it is killed if it has not by then."""
    try:
        return process.wait(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "out of time"


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
        return [*_Runs(Path(folder), model, tiny).rows()]


class _Runs:
    """Starts of ``prodial finetune``, side by side: most of their time is starting."""

    def __init__(self, folder: Path, model: str, tiny: bool) -> None:
        self.folder = folder
        self.deadline = time.monotonic() + seconds("runs", tiny)
        self.started: list[subprocess.Popen[bytes]] = []
        steps, sequences, length, tokens = (6, 1, 32, 64) if tiny else (60, 4, 256, 1024)
        self.kill_at = 4 if tiny else 15
        # Enough text, and none to look for.
        text = "\n\n".join(file.read_text() for file in sorted(ROOT.glob("benchmarks/*.py")))
        (folder / "text.txt").write_text(text)
        self.options = [
            "--model", model, "--data", str(folder / "text.txt"), "--steps", str(steps),
            "--batch-size", str(sequences), "--seq-len", str(length), "--eval-every", "0",
            "--eval-tokens", str(tokens), "--warmup", "4", "--lr", "0.003",
            "--loss", "chunked", "--save-every", "2" if tiny else "6",
            "--device", "cpu" if tiny else "cuda",
        ]  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """What was found, as it is found."""
        try:
            yield from self._rows()
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            yield {"part": "runs", "error": f"{type(error).__name__}: {error}"}
        finally:
            for process in self.started:
                if process.poll() is None:
                    # Python says where it was.
                    process.send_signal(signal.SIGABRT)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=2.0)
                process.kill()

    def _rows(self) -> Iterator[Row]:
        whole = [self.start(name, gpu) for gpu, name in enumerate(("one", "again"))]
        launch = ["--nproc-per-node", str(SIZE), "--master-addr", "127.0.0.1", "--master-port"]
        port = environments()[0]["MASTER_PORT"]
        command = ["-m", "torch.distributed.run", *launch, port, "-m", "prodial_kernels"]
        whole.append(self._start([*command, *self.command("two")], {"MAMBA_DETERMINISTIC": "1"}))
        divided = [*self.options, "--grad-accumulation", "2", "--shard"]
        whole += [self.start_of_two("shard", place, *divided) for place in environments()]
        pairs = {name: [self.start_of_two(name, p) for p in environments()] for name in KILLED}
        with ThreadPoolExecutor(len(pairs)) as pool:
            # A few steps later each of them would be over.
            ended = [*pool.map(self.killed, pairs, pairs.values(), (1, 0))]
        for name, (code, took) in zip(pairs, ended, strict=True):
            yield {"part": "runs", "what": f"{name}: the other", "exit": code, "seconds": took}
        shutil.copytree(self.folder / KILLED[0], self.folder / "on_one")
        again = [self.start_of_two(name, p, "--resume") for name in KILLED for p in environments()]
        again.append(self.start("on_one", 0, "--resume"))
        for process in whole:
            self._end(process)
        right = self.losses("one")
        for what, name in (
            (AGAIN, "again"), ("torchrun, two GPUs", "two"), ("two GPUs, --shard", "shard")
        ):  # fmt: skip
            yield {"part": "runs", "what": what, **compared(self.losses(name), right)}
        for process in again:
            self._end(process)
        for name in KILLED:
            found = compared(self.losses(name), self.losses("two"))
            yield {"part": "runs", "what": f"{name}, resumed on two, beside two", **found}
        found = compared(self.losses("on_one"), self.losses("two"))
        yield {"part": "runs", "what": "checkpoint of two, resumed on one, beside two", **found}

    def command(self, name: str, *more: str) -> list[str]:
        output = ["--output", str(self.folder / name)]
        return ["finetune", *(more or [*self.options, "--grad-accumulation", "2"]), *output]

    def start(self, name: str, gpu: int, *more: str) -> subprocess.Popen[bytes]:
        place = {"CUDA_VISIBLE_DEVICES": str(gpu), "MAMBA_DETERMINISTIC": "1"}
        return self._start(["-m", "prodial_kernels", *self.command(name, *more)], place)

    def start_of_two(
        self, name: str, environment: Mapping[str, str], *more: str
    ) -> subprocess.Popen[bytes]:
        return self._start(["-m", "prodial_kernels", *self.command(name, *more)], environment)

    def _start(self, words: Sequence[str], environment: Mapping[str, str]) -> Any:
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **environment}
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
        self.started.append(process)
        return process

    def _left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.1)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait(timeout=self._left()):
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")

    def killed(
        self, name: str, pair: Sequence[subprocess.Popen[bytes]], which: int
    ) -> tuple[int, float]:
        """Kill one of two processes within their run; how the other ended, after how long."""
        file = self.folder / name / "metrics.jsonl"
        while self._left() > 0.1 and pair[which].poll() is None:
            if file.exists() and f'"step": {self.kill_at},' in file.read_text():
                break
            time.sleep(0.002)
        pair[which].send_signal(signal.SIGKILL)
        began = time.monotonic()
        pair[which].wait()
        code = pair[1 - which].wait(timeout=min(self._left(), 30.0))
        return code, time.monotonic() - began

    def losses(self, name: str) -> list[Row]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in _TIMED} for line in lines]


def compared(found: Sequence[Row], right: Sequence[Row]) -> Row:
    """How far the losses of two runs are apart, relative, and whether every figure is equal."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, right, strict=True)]
    far = [abs(a - b) / abs(b) for a, b in pairs]
    return {"farthest_loss": max(far), "last_loss": far[-1], "equal": list(found) == list(right)}


# Judging


def failed(rows: Sequence[Row]) -> list[str]:
    """What is not as it must be, in words."""
    said = [f"{place_of(row)}: {row['error']}" for row in rows if "error" in row]
    gradients = [row for row in rows if row["part"] == "gradients" and "ulps" in row]
    place = ("model", "dtype", "base")
    for row in gradients:
        alike = [r for r in gradients if all(r[k] == row[k] for k in place)]
        noise = [r["ulps"] for r in alike if r["way"] == row.get("beside")]
        # A few roundings of a sum where nothing else differs.
        most = max([targets.GRADIENT_ULPS, *(2 * ulps for ulps in noise)])
        if "beside" in row and not row["ulps"] <= most:
            said.append(f"{place_of(row)}: {row['ulps']:.3g} ulps")
    for row in rows:
        judged = row.get("default", True)
        if judged and row.get("over_one", targets.OVER_ONE_ON_TWO) < targets.OVER_ONE_ON_TWO:
            said.append(f"{place_of(row)}: {row['over_one']:.2f} times one GPU's tokens/s")
    runs_of = {row["what"]: row for row in rows if row["part"] == "runs" and "what" in row}
    noise = runs_of.get(AGAIN, {}).get("farthest_loss", 0.0)
    for what, row in runs_of.items():
        if row.get("farthest_loss", 0.0) > max(targets.LOSS_OF_TWO, 2 * noise):
            said.append(f"{what}: losses {row['farthest_loss']:.2g} apart")
        if not (row.get("exit", 1) == 1 and row.get("seconds", 0.0) < targets.SECONDS_AFTER_A_KILL):
            said.append(f"{what}: ended with {row['exit']} after {row['seconds']:.1f} s")
    return said


def add_ratios(rows: Sequence[Row]) -> None:
    """Say of rows of several GPUs how many times the tokens/s of one they have."""
    alone = {row["model"]: row for row in rows if row.get("processes") == 1}
    for row in rows:
        if row.get("processes", 1) > 1 and row["model"] in alone and "error" not in row:
            one = alone[row["model"]]["tokens_per_second"]
            row["over_one"] = row["tokens_per_second"] / one


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    lines: list[str] = []
    for row in rows:
        if "error" in row:
            lines.append(f"{place_of(row)}: {row['error'].splitlines()[0]}")
        elif row["part"] == "gradients":
            lines.append(
                f"{row['model']:11} {row['dtype']:9} {row['base']:6} {row['way']:32} "
                f"{row['ulps']:10.3g} {row['median_ulps']:10.3g} "
                f"{row['equal']:3}/{row['parameters']} equal"
            )
        elif "exit" in row:
            lines.append(f"{row['what']:36} ended with {row['exit']} after {row['seconds']:.1f} s")
        elif row["part"] == "runs":
            lines.append(
                f"{row['what']:36} losses {row['farthest_loss']:.2g} apart, "
                f"{'every figure equal' if row['equal'] else 'not bit-equal'}"
            )
        else:
            times = f", {row['over_one']:.2f}×" if "over_one" in row else ""
            spans = "".join(
                f", {name} {row[f'{kind}_ms']:.0f} ms, {row[f'{kind}_beside_others_ms']:.0f} of it "
                "beside other kernels"
                for kind, name in (("nccl", "NCCL"), ("copies", "copies"))
                if row.get(f"{kind}_ms")
            )
            lines.append(
                f"{row['model']:14} {row['processes']} {row['way']:20} {row['ms']:8.1f} ms "
                f"{row['tokens_per_second']:10,.0f} tokens/s {row['peak_gb']:.1f} GB{times}{spans}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
