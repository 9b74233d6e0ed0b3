"""Do adapters learn as well on products in fp8 as on those in 16 bits?

The embedded, really pretrained model on a text that it was not trained on: the same seeds, batches
and steps by the products of each of :data:`COMPUTES`, ProDiaL and LoRA, in captured steps. What is
compared is the loss on held-out text; and, while a run in fp8 goes on, the direction of its
gradient with that of the same batch without the roundings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from benchmarks.harness.memory import release
from benchmarks.training.learning.curves import BATCH, LENGTH, text_tokens
from prodial_kernels.linear import unrounded
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.data.batches import BatchSizes
from prodial_kernels.training.data.packing import PackedBatches
from prodial_kernels.training.method import prepare_method
from prodial_kernels.training.run.loop import LoopOptions, learning_rate
from prodial_kernels.training.step.choose import decide, facts_of, make_step

METHODS = ("prodial", "lora")
Curves = Mapping[int, Sequence[tuple[int, float]]]
"""By seed, (steps taken, held-out loss)."""
# "same": 16 bits (fp32 on a CPU); "fp8"; "stored": weights in fp8, products in 16 bits.
COMPUTES = ("same", "fp8", "stored")
HELD_OUT_WINDOWS = {"cuda": 64, "cpu": 2}
EVALUATIONS = 5


@dataclass(frozen=True)
class Run:
    """One run: ``seed`` draws the adapter and the order of the text."""

    method: str
    seed: int
    compute: str


@dataclass
class LearningRow:
    """What one run came to, in nats a token.

    Attributes:
        held_out: (steps taken, loss on the held-out text), from before the first step on.
        train: Mean loss of each of as many parts of the run.
        cosine: (steps taken, cosine of the gradient with that without roundings), in fp8.
        unrounded: The last held-out loss, evaluated without the roundings.
        seconds: Wall time.
        error: Why it did not end.
    """

    method: str
    seed: int
    compute: str
    held_out: list[tuple[int, float]] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    cosine: list[tuple[int, float]] = field(default_factory=list)
    unrounded: float | None = None
    seconds: float = 0.0
    error: str | None = None


def train(run: Run, device: str, steps: int, deadline: float) -> LearningRow:
    """Take ``steps`` steps; stop at ``deadline``, a time as ``time.time`` has it."""
    row = LearningRow(run.method, run.seed, run.compute)
    started = time.perf_counter()
    try:
        _train(run, row, device, steps, deadline)
    # One that fails is a row, and the others go on.
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def _train(run: Run, row: LearningRow, device: str, steps: int, deadline: float) -> None:
    release(device, workspaces=True)
    where, dtype = torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32
    stored = None if run.compute == "same" else "fp8"
    model = load_model("embedded", device=where, dtype=dtype, quantize=stored).model
    torch.manual_seed(run.seed)
    config = FinetuneConfig(
        method=run.method, r=16, batch_size=BATCH, seq_len=LENGTH[device],
        activations="keep", loss="full", cuda_graph="on" if device == "cuda" else "off",
        compute="fp8" if run.compute == "fp8" else None,
    ).resolved()  # fmt: skip
    optimizer = prepare_method(model, config).optimizer
    model.train()
    batches = PackedBatches(text_tokens(), BatchSizes(config.seq_len, BATCH, seed=run.seed))
    windows = text_tokens("held_out")
    windows = windows[: HELD_OUT_WINDOWS[device] * LENGTH[device]].view(-1, LENGTH[device]).long()
    step = make_step(model, optimizer, config, decide(config, facts_of(model), where), device=where)
    options = LoopOptions(steps=steps, lr=config.lr, warmup=config.warmup)
    part = max(1, steps // EVALUATIONS)
    losses = []
    for number in range(steps):
        if number % part == 0:
            row.held_out.append((number, held_out_loss(model, windows.to(where))))
            # Of a run of minutes, something is to be seen before it ends.
            said = f"{run.method} seed {run.seed} {run.compute}: {number} steps"
            print(f"  {said}, held-out {row.held_out[-1][1]:.4f}", file=sys.stderr, flush=True)
            if run.compute == "fp8":
                batch = batches.batch(number).input_ids.to(where)
                row.cosine.append((number, gradient_cosine(model, batch)))
            if time.time() > deadline:
                raise TimeoutError(f"stopped after {number} steps: the time was up")
        step.begin([batches.batch(number)], learning_rate(options, number))
        losses.append(step.finish().loss)
    step.close()
    row.train = [fmean(losses[at : at + part]) for at in range(0, steps, part)]
    row.held_out.append((steps, held_out_loss(model, windows.to(where))))
    if run.compute == "fp8":
        with unrounded(model):
            row.unrounded = held_out_loss(model, windows.to(where))


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean loss over windows, int64 [n, length]."""
    model.eval()
    parts = windows.split(16)
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.float() for part in parts]
    model.train()
    return float(sum(loss * len(part) for loss, part in zip(losses, parts, strict=True))) / len(
        windows
    )


def gradient_cosine(model: nn.Module, batch: Tensor) -> float:
    """Cosine of the gradient of all that trains with that of the same batch without roundings."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient() -> Tensor:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        return torch.cat([part.double().flatten() for part in torch.autograd.grad(loss, trained)])

    here = gradient()
    with unrounded(model):
        return float(torch.cosine_similarity(here, gradient(), 0))


def runs_of(seeds: int) -> list[Run]:
    """Every run, the most telling first: a seed's pair in 16 bits and fp8 before the next seed."""
    pairs = [
        Run(method, seed, compute)
        for seed in range(seeds) for method in METHODS for compute in COMPUTES[:2]
    ]  # fmt: skip
    rest = [Run(m, seed, c) for seed in range(seeds) for m in METHODS for c in COMPUTES[2:]]
    return pairs + rest


def run_learning(
    device: str,
    steps: int,
    seeds: int,
    *,
    seconds: float = 0.0,
    workers: int = 0,
    keep: Callable[[Sequence[LearningRow]], None] = lambda rows: None,
) -> tuple[list[LearningRow], bool]:
    """Train every run and print rows and :func:`summary` as they come.

    Args:
        device: ``"cuda"``, or ``"cpu"`` to try it out.
        steps: Of every run.
        seeds: How many.
        seconds: After which no run goes on; 0 for no limit.
        workers: Processes that share the device, which a step leaves idle most of the time; 0 for
            this one.
        keep: Told all rows after each.

    Returns:
        The rows, and whether each method's mean loss in fp8 is within the seeds' spread of that in
        16 bits.
    """
    deadline = time.time() + seconds if seconds else float("inf")
    rows = []
    for row in _trained(runs_of(seeds), device, steps, deadline, workers):
        rows.append(row)
        print(text_of(row), flush=True)
        keep(rows)
    lines, good = summary(rows)
    print("\n".join(lines), flush=True)
    return rows, good


def _trained(
    runs: Sequence[Run], device: str, steps: int, deadline: float, workers: int
) -> Iterator[LearningRow]:
    if workers == 0:
        for run in runs:
            yield train(run, device, steps, deadline)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(train, run, device, steps, deadline) for run in runs]
        for result in as_completed(waiting):
            yield result.result()


def text_of(row: LearningRow) -> str:
    """One line."""
    head = f"{row.method:8} seed {row.seed} {row.compute:6} {row.seconds:5.1f} s"
    if row.error is not None:
        return f"{head} FAILED: {row.error}"
    curve = " ".join(f"{loss:.4f}" for _, loss in row.held_out)
    tail = ""
    if row.unrounded is not None:
        cosines = " ".join(f"{value:.4f}" for _, value in row.cosine)
        tail = f"; without rounding {row.unrounded:.4f}; cosine {cosines}"
    return f"{head} held-out {curve}{tail}"


def summary(rows: Sequence[LearningRow]) -> tuple[list[str], bool]:
    """Lines on each method, and whether fp8 is within the seeds' spread of 16 bits everywhere."""
    lines, good = [], True
    for method in METHODS:
        curves = {
            compute: {
                row.seed: row.held_out
                for row in rows
                if row.error is None and (row.method, row.compute) == (method, compute)
            }
            for compute in COMPUTES
        }
        last = {c: {s: at[-1][1] for s, at in curves[c].items()} for c in COMPUTES}
        for compute in COMPUTES[1:]:
            seeds = sorted(last["same"].keys() & last[compute].keys())
            if len(seeds) < 2:
                good &= compute != "fp8"
                if last[compute]:
                    lines.append(f"{method}: too few seeds in 16 bits and {compute!r}")
                continue
            here, there = ([last[c][seed] for seed in seeds] for c in (compute, "same"))
            gaps = [a - b for a, b in zip(here, there, strict=True)]
            spread = stdev(there)
            within = abs(fmean(gaps)) <= spread
            good &= within or compute != "fp8"
            lines.append(
                f"{method}: held-out {fmean(there):.4f} ± {spread:.4f} in 16 bits, "
                f"{fmean(here):.4f} ± {stdev(here):.4f} {compute!r}, over {len(seeds)} seeds; by "
                f"seed {fmean(gaps):+.4f} ± {stdev(gaps):.4f}: "
                f"{'within' if within else 'NOT within'} the spread of seeds"
                f"{_at_the_lowest(curves['same'], curves[compute], seeds)}"
            )
    return lines, good


def _at_the_lowest(there: Curves, here: Curves, seeds: Sequence[int]) -> str:
    """The same difference where the loss in 16 bits is lowest, if that is not the end.

    On a text of little length runs end above it, and further apart from each other.
    """
    means = [fmean(there[seed][i][1] for seed in seeds) for i in range(len(there[seeds[0]]))]
    lowest = means.index(min(means))
    if lowest == len(means) - 1:
        return ""
    gaps = [here[seed][lowest][1] - there[seed][lowest][1] for seed in seeds]
    spread = stdev(there[seed][lowest][1] for seed in seeds)
    return (
        f". At the lowest, after {there[seeds[0]][lowest][0]} steps: {means[lowest]:.4f} ± "
        f"{spread:.4f} in 16 bits, by seed {fmean(gaps):+.4f} ± {stdev(gaps):.4f}"
    )
