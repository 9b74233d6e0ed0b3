"""Whether runs take what the memory plan says: peaks of whole runs beside the planned ones.

``python -m benchmarks.training.promise --seconds 120`` takes models at their real dimensions with
random weights, plans runs of them as ``prodial finetune`` does (shapes, formats, budgets, levels,
captured or not), holds PyTorch to each budget, and trains: an evaluation, a few steps, an
evaluation. It adds a row a run to ``promise.jsonl``, leaves out what is there already, and writes
``promise.json`` and, with the histogram, ``promise.md``. Several models are on the device at a
time, each in a process of its own, since peaks do not depend on neighbours; one process runs all
cases of one model in one format, which it builds once. What is kept: the measured peak within 2%
or 32 MiB of the planned one, whichever is more, and no run out of memory. Exit code 1 where that
is broken.

A budget is given as a share of the way from the least that the plan accepts to what the fastest
run takes. Weights are made where they are trained, so loading is no part of it. Upstream's Mamba-2
kernels choose among two configurations each, before the run and within the budget, as there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

from benchmarks.harness.environment import ROOT, describe  # noqa: E402
from benchmarks.harness.store import json_text, results_of, write_text  # noqa: E402
from benchmarks.harness.text import text_table  # noqa: E402

MIB = 2**20
SHARE, FLOOR = 0.02, 32 * MIB
# What all processes together may plan to take of a device.
ROOM = 0.85
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A run: the first three say which model is built, the others as ``prodial finetune`` has them.

    Attributes:
        budget: A share, see the module; None for no budget.
    """

    model: str
    format: str | None
    modules: str
    batch: int
    length: int
    activations: str = "auto"
    budget: float | None = None
    graph: bool = False
    experts: str = "device"
    loss: str = "auto"
    optimizer: str = "adamw"

    @property
    def group(self) -> str:
        """What is built once."""
        host = "-host" if self.experts == "host" else ""
        return f"{self.model}/{self.format or 'bf16'}/{self.modules}{host}"

    def __str__(self) -> str:
        kept = self.activations if self.budget is None else f"budget {self.budget:g}"
        more = [self.loss, self.optimizer, "graph" if self.graph else "auto"]
        words = [word for word in more if word not in ("auto", "adamw")]
        return " ".join([self.group, f"{self.batch}x{self.length}", kept, *words])


def _cases() -> Iterator[Case]:
    """The most different ones of a model first: time may end."""
    hybrids = (
        "nemotron-3-nano-4b", "nemotron-h-8b", "falcon-h1-7b", "granite-4.0-h-micro", "bamba-9b",
        "zamba2-7b",
    )  # fmt: skip
    for model in (*hybrids, "zamba-7b", "falcon-mamba-7b"):
        yield Case(model, "nf4", "all", 1, 2048, budget=0.1)
        yield Case(model, "nf4", "all", 2, 1024, "checkpoint", graph=model != "zamba-7b")
        yield Case(model, "nf4", "all", 1, 1024, "keep")
        yield Case(model, "nf4", "all", 1, 2048, "offload")
        yield Case(model, "nf4", "all", 1, 512, budget=0.5)
    for model in ("mamba-1.4b", "mamba2-2.7b", "nemotron-3-nano-4b", "granite-4.0-h-micro"):
        yield Case(model, None, "projectors", 4, 1024, budget=0.2)
        yield Case(model, None, "projectors", 1, 2048, "keep")
        yield Case(model, None, "projectors", 2, 1024, "recompute", graph=True)
        yield Case(model, None, "projectors", 2, 512, budget=0.6, optimizer="adamw8bit")
    host: dict[str, Any] = {"experts": "host"}
    for model in ("nemotron-3-nano-30b-a3b", "jamba-52b"):
        yield Case(model, "nf4", "all", 1, 2048, budget=0.3)
        yield Case(model, "nf4", "all", 1, 1024, "checkpoint")
    yield Case("nemotron-3-nano-30b-a3b", "nf4", "all", 1, 2048, "checkpoint", **host)
    yield Case("nemotron-3-nano-30b-a3b", "nf4", "all", 1, 512, budget=0.5, **host)
    for model, format in (("mamba-1.4b", "nf4"), ("mamba2-2.7b", "fp8"), ("mamba-2.8b", "int8")):
        yield Case(model, format, "projectors", 4, 1024, budget=0.3)
        yield Case(model, format, "projectors", 1, 2048, "checkpoint", graph=True)
        yield Case(model, format, "projectors", 2, 512, "keep")
    for format in ("int8", "fp8"):
        yield Case("falcon-h1-7b", format, "all", 1, 2048, budget=0.3)
        yield Case("falcon-h1-7b", format, "all", 1, 1024, "keep")
    yield Case("mamba-130m", None, "projectors", 8, 2048, budget=0.3)
    yield Case("mamba-130m", None, "projectors", 4, 512, "keep", loss="full")
    yield Case("mamba-130m", None, "projectors", 4, 512, "keep", graph=True)
    yield Case("mamba-130m", None, "projectors", 1, 256, "checkpoint")
    # Large budgets: dense weights of 15 to 20 GB, with whatever the layers keep.
    for model in ("nemotron-h-8b", "falcon-mamba-7b"):
        yield Case(model, None, "projectors", 2, 2048, budget=0.5)
        yield Case(model, None, "projectors", 4, 2048, budget=0.9)


CASES = tuple(_cases())
TINY_CASES = (
    Case("tiny", None, "projectors", 2, 32, "keep"),
    Case("tiny", None, "projectors", 2, 32, "checkpoint"),
    Case("tiny-moe", "nf4", "all", 2, 32, "offload", experts="host"),
)


@dataclass
class Row:
    """One run.

    Attributes:
        case: Its text, by which it is known.
        levels: Number of layers at each level.
        moment: When the plan has its peak.
        limit: What the budget leaves PyTorch, in bytes; None without one.
        predicted, measured, reserved: Bytes of PyTorch's tensors, and of its segments.
        during: The measured peak of (an evaluation, the steps, an evaluation).
        tuning, tuned: Planned and measured bytes while upstream's kernels chose; 0 where they did
            not.
        error: Why there is no measurement.
    """

    case: str
    levels: dict[str, int]
    moment: str = ""
    graphed: bool = False
    limit: int | None = None
    predicted: int = 0
    measured: int = 0
    reserved: int = 0
    during: tuple[int, ...] = ()
    tuning: int = 0
    tuned: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def off(self) -> float:
        """Measured over planned, less one."""
        return self.measured / self.predicted - 1 if self.measured else float("nan")

    @property
    def kept(self) -> bool:
        """Whether the promise is."""
        within = abs(self.measured - self.predicted) <= max(SHARE * self.predicted, FLOOR)
        return not self.error and within

    def __str__(self) -> str:
        if self.error:
            return f"{self.case:68} FAILED {self.error}"
        return (
            f"{self.case:68} {self.measured / MIB:9,.0f} of {self.predicted / MIB:9,.0f} MiB "
            f"{100 * self.off:+6.2f}% {'' if self.kept else 'BROKEN '}{self.moment}"
        )


def read_rows(file: Path) -> list[Row]:
    """Rows that are on disk; of a case the newest one."""
    if not file.exists():
        return []
    rows = [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({row.case: row for row in rows}.values())


def _in_order(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    order = {str(case): place for place, case in enumerate(cases)}
    return sorted(rows, key=lambda row: order.get(row.case, len(order)))


def write_all(folder: Path, record: dict[str, Any], cases: Sequence[Case]) -> list[Row]:
    """Write ``promise.json`` and ``promise.md`` of the rows on disk, and return these."""
    rows = _in_order(read_rows(folder / "promise.jsonl"), cases)
    write_text(folder / "promise.json", json_text({**record, "rows": list(map(asdict, rows))}))
    write_text(folder / "promise.md", page(rows, record))
    return rows


def page(rows: Sequence[Row], record: dict[str, Any]) -> str:
    """The histogram, what is off, and every row."""
    good = [row for row in rows if row.measured]
    bins = Counter(round(100 * row.off * 2) / 2 for row in good)
    lines = [f"{edge:+5.1f}%  {'█' * bins[edge]} {bins[edge]}" for edge in sorted(bins)]
    broken = [row for row in rows if not row.kept]
    table = text_table(
        ["run", "planned, MiB", "measured", "off", "budget's, MiB", "peak"],
        [
            [
                row.case, f"{row.predicted / MIB:,.0f}", f"{row.measured / MIB:,.0f}",
                row.error.partition(".")[0] or f"{100 * row.off:+.2f}%",
                f"{row.limit / MIB:,.0f}" if row.limit else "–", row.moment,
            ]
            for row in rows
        ],
    )  # fmt: skip
    return "\n".join(
        [
            "# Measured peaks beside planned ones",
            "",
            f"{len(rows)} runs on an {record['device']}, {record['date']}, "
            f"{len(rows) - len(broken)} of them within 2% or 32 MiB of the plan; "
            f"{sum(1 for row in rows if row.error)} failed.",
            "",
            "Measured over planned, in steps of half a per cent:",
            "",
            "```",
            *lines,
            "```",
            "",
            table,
            "",
            *(f"{note}\n" for note in record.get("notes", ())),
            f"`{record['command']}`, torch {record['versions']['torch']}, transformers "
            f"{record['versions']['transformers']}.",
            "",
        ]
    )


# In a process of its own from here on.


@contextmanager
def room(folder: Path, wanted: int, most: int, until: float) -> Iterator[bool]:
    """Wait until the processes together leave so many bytes; yield whether that came in time."""
    own = folder / f"{os.getpid()}.room"
    try:
        while True:
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                taken = sum(int(file.read_text()) for file in folder.glob("*.room"))
                # The largest runs alone.
                if not taken or taken + wanted <= most:
                    own.write_text(str(wanted))
                    break
            if time.time() > until:
                yield False
                return
            time.sleep(0.2)
        yield True
    finally:
        own.unlink(missing_ok=True)


def run_group(cases: Sequence[Case], file: Path, until: float, tiny: bool) -> None:
    """Run the cases of one model; add a row each to ``file``."""
    import torch

    from benchmarks.models import upstream
    from benchmarks.training.jobs import CONFIGURATIONS
    from benchmarks.training.random_weights import random_packed
    from benchmarks.training.sizes import transformers_config
    from prodial_kernels.training.memory.allocator import grow_segments

    grow_segments()
    place = torch.device("cpu" if tiny else "cuda")
    dtype = torch.float32 if tiny else torch.bfloat16
    if not tiny:
        upstream.load(CONFIGURATIONS)

    def keep(row: Row) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)

    first = cases[0]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        transformers_config(first.model).save_pretrained(folder)
        planned = []
        for case in cases:
            try:
                planned.append((case, *plan_of(case, folder, place, dtype)))
            except ValueError as error:
                keep(Row(str(case), {}, error=" ".join(str(error).split())[:300]))
        wanted = [run.plan.needed for _, _, _, run in planned if run is not None]
        if wanted:
            most = int(ROOM * torch.cuda.mem_get_info(place)[1])
            if not stack.enter_context(room(file.parent, max(wanted), most, until)):
                return
        torch.manual_seed(0)
        model = random_packed(
            transformers_config(first.model), place, dtype, first.format, first.modules,
            experts_on_host=first.experts == "host",
        )  # fmt: skip
        for case, config, choice, run in planned:
            if time.time() > until:
                return
            started = time.perf_counter()
            row = Row(str(case), {}, graphed=choice.graphed)
            if run is not None:
                row.levels = dict(Counter(run.plan.levels))
                row.moment, row.predicted = run.plan.peak.moment, run.plan.peak.total
                row.limit = run.allowed
            try:
                measure(model, config, choice, run, row, place)
            except Exception as error:
                row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row.seconds = time.perf_counter() - started
            keep(row)


def plan_of(case: Case, folder: str, place: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """What the command line would run: configuration, choice and plan."""
    from prodial_kernels.training.config import FinetuneConfig
    from prodial_kernels.training.memory.run_plan import plan_run

    options: dict[str, Any] = {} if case.format is None else {
        "quantize": case.format, "quantize_modules": case.modules, "experts": case.experts,
    }  # fmt: skip
    config = FinetuneConfig(
        model=folder, batch_size=case.batch, seq_len=case.length, activations=case.activations,
        cuda_graph="on" if case.graph and place.type == "cuda" else "off", loss=case.loss,
        optimizer=case.optimizer, lr=1e-5, **options,
    ).resolved()  # fmt: skip
    if case.budget is not None:
        ends = []
        for level in ("keep", "offload"):
            _, run = plan_run(replace(config, activations=level), place, dtype)
            if run is None:
                raise ValueError("nothing is planned here, so there is no budget")
            ends.append(run.plan.needed)
        most, least = ends
        # A mixture of levels can take a little more than the leanest one everywhere.
        budget = 1.01 * least + case.budget * max(0, most - least)
        config = replace(config, memory_budget=f"{budget / 1e9:.2f}GB")
    return config, *plan_run(config, place, dtype)


def measure(
    model: Any, config: Any, choice: Any, run: Any, row: Row, place: Any
) -> None:  # fmt: skip
    """Evaluate, train, evaluate, within the budget; leave the model as it was."""
    import torch

    from benchmarks.harness.memory import release
    from prodial_kernels import remove_prodial
    from prodial_kernels.models.layers.recompute import prepare_blocks
    from prodial_kernels.training.data.batches import BatchSizes
    from prodial_kernels.training.data.packing import PackedBatches
    from prodial_kernels.training.memory.device import limited
    from prodial_kernels.training.memory.run_plan import block_levels
    from prodial_kernels.training.method import prepare_method
    from prodial_kernels.training.scoring.log_likelihood import Scorer, Window
    from prodial_kernels.training.step.choose import make_step
    from prodial_kernels.training.step.graphed import WARM_UP
    from prodial_kernels.training.step.tuning import tune

    cuda = place.type == "cuda"
    release(place.type, workspaces=True)
    during = []
    reserved = 0

    def noted() -> None:
        nonlocal reserved
        if cuda:
            torch.cuda.synchronize()
            during.append(torch.cuda.max_memory_allocated())
            reserved = max(reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    with ExitStack() as stack:
        stack.enter_context(limited(place, None if run is None else run.allowed))
        optimizer = prepare_method(model, config).optimizer
        stack.callback(remove_prodial, model)
        chosen = block_levels(model, config.chosen_activations, run)
        stack.callback(prepare_blocks(model, chosen, device=place).remove)
        step = make_step(model, optimizer, config, choice, device=place)
        stack.callback(step.close)
        size = model.config.vocab_size
        tokens = torch.randint(0, size, (config.batch_size * config.seq_len * 4,)).to(torch.int32)
        batches = PackedBatches(tokens, BatchSizes(config.seq_len, config.batch_size))
        scorer = Scorer(
            model, SimpleNamespace(bos_token_id=1, eos_token_id=2), seq_len=config.seq_len,
            batch_size=config.batch_size if run is None else run.plan.evaluation_batch,
        )  # fmt: skip
        windows = [Window(tokens[: config.seq_len + 1].long(), config.seq_len)] * config.batch_size
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if run is not None and run.plan.tuning_tokens:
            tune(model, run.plan.tuning_tokens)
            row.tuned, row.tuning = torch.cuda.max_memory_allocated(), run.plan.tuning
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        scorer.log_likelihoods(windows)
        noted()
        model.train()
        for number in range(WARM_UP + STEPS if choice.graphed else STEPS):
            step.begin([batches.batch(number)], 1e-5)
            if not step.finish().finite:
                raise RuntimeError("the loss is not finite")
        noted()
        row.graphed = getattr(step, "captures", False)
        scorer.log_likelihoods(windows)
        noted()
    row.during, row.reserved = tuple(during), reserved
    row.measured = max(during, default=0)
    del optimizer, step, scorer
    release(place.type, workspaces=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not on disk yet; print, write; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser("python -m benchmarks.training.promise", description=__doc__)
    option = parser.add_argument
    option(
        "--seconds", type=float, default=240.0, help="stop then; more another time (%(default)s)"
    )
    option("--output", type=Path, metavar="DIR", help="default benchmarks/results/<device>")
    option("--models", nargs="+", metavar="NAME", help="only cases of these models")
    option("--workers", type=int, default=12, metavar="N", help="processes at a time (%(default)s)")
    option("--again", action="store_true", help="also what is on disk already")
    option("--page", action="store_true", help="write promise.md from what is on disk, no more")
    option("--tiny", action="store_true", help="tiny models on a CPU: tries the command out")
    option("--group", help=argparse.SUPPRESS)
    option("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cases = TINY_CASES if options.tiny else CASES
    if options.group:
        own = [case for case in cases if case.group == options.group]
        known = {row.case for row in read_rows(options.output / "promise.jsonl") if not row.error}
        left = own if options.again else [case for case in own if str(case) not in known]
        run_group(left, options.output / "promise.jsonl", options.until, options.tiny)
        return 0
    if options.page:
        if options.output is None:
            parser.error("--page needs --output, where promise.jsonl and promise.json are")
        record = json.loads((options.output / "promise.json").read_text(encoding="utf-8"))
        return int(not all(row.kept for row in write_all(options.output, record, cases)))
    started = time.time()
    until = started + options.seconds
    record = describe("cpu" if options.tiny else "cuda", "python -m benchmarks.training.promise")
    folder = options.output or results_of(record["device"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "promise.jsonl"
    known = {row.case for row in read_rows(file) if not row.error}
    wanted = [case for case in cases if not options.models or case.model in options.models]
    left = wanted if options.again else [case for case in wanted if str(case) not in known]
    waiting = list(dict.fromkeys(case.group for case in left))
    given = [*(["--again"] * options.again), *(["--tiny"] * options.tiny)]
    command = [sys.executable, "-m", "benchmarks.training.promise", "--output", str(folder)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    running: list[subprocess.Popen[bytes]] = []
    try:
        while (waiting or running) and time.time() < until:
            while waiting and len(running) < options.workers:
                # The rest of a case may take a while; what is not done by then is ended.
                which = ["--group", waiting.pop(0), "--until", str(until - 3)]
                process = subprocess.Popen([*command, *which, *given], cwd=ROOT, env=environment)
                running.append(process)
            time.sleep(0.1)
            running = [process for process in running if process.poll() is None]
    finally:
        for process in running:
            process.kill()
            process.wait()
        for leftover in [*folder.glob("*.room"), folder / "lock"]:
            with suppress(FileNotFoundError):
                leftover.unlink()
    rows = write_all(folder, record, cases)
    new = [row for row in rows if row.case in {str(case) for case in left}]
    print(page(rows, record))
    print(f"{len(new)} of {len(left)} in {time.time() - started:.0f} s")
    return int(not all(row.kept for row in rows))


if __name__ == "__main__":
    sys.exit(main())
