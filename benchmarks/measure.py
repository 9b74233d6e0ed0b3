"""One row for each case and rival: gate, then time, memory, roofline and error together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config

from benchmarks import breakdown, memory
from benchmarks.cases import Case, draw, rotating_sets
from benchmarks.environment import cache_bytes
from benchmarks.gate import Errors, Gate, Refusal
from benchmarks.rivals import FLOOR, OURS, Rival
from benchmarks.rivals.layer import Step
from benchmarks.roofline import Ceilings, work
from benchmarks.timing import Replay, Summary, eager_time, host_time, interleave
from prodial_kernels.testing import LinearCase

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        rounds: Samples of each variant.
        forward: Time the forward alone too.
        eager: Measure eager wall time and host time.
        kernels: Break ProDiaL's and the floor's step down by kernel.
        warm_s: Seconds of work before the first sample of a case.
        budget_s: Seconds to spend on each of eager and host time.
    """

    rounds: int = 20
    forward: bool = True
    eager: bool = True
    kernels: bool = True
    warm_s: float = 0.2
    budget_s: float = 0.3


QUICK = Settings(rounds=12, forward=False, kernels=False, warm_s=0.1, budget_s=0.05)
TINY = Settings(rounds=3, warm_s=0.0, budget_s=0.01)


@dataclass
class Contender:
    """A rival that passed the gate on a case, with its operand sets and recorded replays."""

    rival: Rival
    errors: Errors
    steps: list[Step]
    both: Replay
    forward: Replay | None
    figures: Row = field(default_factory=dict)


def measure_case(
    case: Case, rivals: Sequence[Rival], device: str, ceilings: Ceilings, settings: Settings
) -> list[Row]:
    """Measure every rival on one case, interleaved; a refused or missing one gets its reason.

    The floor must be among the rivals: ratios are to it, in the same rounds.
    """
    start_afresh()
    gate = Gate(case, device)
    pool = torch.cuda.graph_pool_handle() if device.startswith("cuda") else None
    rows = {rival.name: _row(case, rival) for rival in rivals}
    passed: list[tuple[Rival, Errors]] = []
    for rival in rivals:
        with reported(rows[rival.name]):
            if reason := rival.missing():
                raise Unavailable(reason)
            passed.append((rival, gate.check(rival)))
    # Its fp64 results are larger than all that follows.
    del gate
    sets = [draw(case, device, seed) for seed in range(rotating_sets(case, cache_bytes(device)))]
    contenders: list[Contender] = []
    for rival, errors in passed:
        with reported(rows[rival.name]):
            contenders.append(prepare(sets, rival, errors, device, pool, settings))
    timed = {c.rival.name: c.both for c in contenders}
    timed |= {f"{c.rival.name} forward": c.forward for c in contenders if c.forward is not None}
    samples = interleave(timed, settings.rounds, settings.warm_s)
    for contender in contenders:
        name = contender.rival.name
        forward = samples.get(f"{name} forward")
        rows[name] |= contender.figures
        rows[name] |= figures(case, contender, samples[name], forward, ceilings)
    _add_ratios(rows)
    return list(rows.values())


class Unavailable(Exception):
    """The rival cannot run here."""


@contextmanager
def reported(row: Row) -> Iterator[None]:
    """Put what went wrong with one rival into its row; the others are measured all the same."""
    try:
        yield
    except Unavailable as reason:
        row["status"] = f"unavailable: {reason}"
    except Refusal as refusal:
        row["status"] = f"refused: {refusal}"
    except Exception as error:
        row["status"] = f"failed: {type(error).__name__}: {str(error)[:300]}"


def prepare(
    sets: Sequence[LinearCase],
    rival: Rival,
    errors: Errors,
    device: str,
    pool: object,
    settings: Settings,
) -> Contender:
    """Run the rival once on each operand set, and record what will be replayed."""
    steps = [Step.on(operands, rival.prepare) for operands in sets]
    for step in steps:
        step.both()
    figures: Row = {}
    first = steps[0]
    cuda = device.startswith("cuda")
    own = [first.weight, *first.layer.trained.values()]
    used = memory.measure(first.forward, first.both, own, cuda)
    figures |= {f"{name}_mib": value for name, value in asdict(used).items()}
    if settings.eager:
        figures["eager_us"] = eager_time(first.both, device, settings.budget_s)
        figures["host_us"] = host_time(first.both, device, settings.budget_s)
    if settings.kernels and rival.name in (OURS, FLOOR):
        figures["kernels_us"] = breakdown.kernel_times(first.both, device)
    forward = None
    if settings.forward:
        forward = Replay([step.forward_only for step in steps], device, pool)
    both = Replay([step.both for step in steps], device, pool)
    return Contender(rival, errors, steps, both, forward, figures)


def figures(
    case: Case,
    contender: Contender,
    both: Sequence[float],
    forward: Sequence[float] | None,
    ceilings: Ceilings,
) -> Row:
    """Turn samples into the figures of a row."""
    summary = Summary.of(both)
    needed = work(case, contender.rival.method)
    row: Row = {
        "status": "ok",
        "both_us": summary.median, "both_low_us": summary.low, "both_high_us": summary.high,
        "spread": summary.spread, "samples": summary.count,
        "tflops": needed.flops / summary.median / 1e6,
        "gbps": needed.bytes / summary.median / 1e3,
        "roofline_us": needed.floor_us(ceilings),
        "roofline_fraction": needed.floor_us(ceilings) / summary.median,
        "output_error": contender.errors.output,
        "gradient_error": contender.errors.gradient,
        "worst_gradient": contender.errors.worst,
    }  # fmt: skip
    if forward is not None:
        row["forward_us"] = Summary.of(forward).median
        # The backward is not recorded alone: it needs its forward's tensors.
        row["backward_us"] = row["both_us"] - row["forward_us"]
    return row


def start_afresh() -> None:
    """Free the last case's graphs, and forget its compiled shapes before their guards add up."""
    gc.collect()
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Inductor times its choices when a kernel first runs. A choice made while many processes
    # compile on the same GPU must not be found on disk by the one that measures.
    torch._inductor.config.autotune_local_cache = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_all(
    plan: Sequence[tuple[Case, Sequence[Rival], Settings]],
    device: str,
    ceilings: Ceilings,
    report: Callable[[list[Row]], None],
) -> list[Row]:
    """Measure case after case, reporting each as soon as its rows are there."""
    rows: list[Row] = []
    for case, rivals, settings in plan:
        measured = measure_case(case, rivals, device, ceilings, settings)
        report(measured)
        rows += measured
    return rows


def _row(case: Case, rival: Rival) -> Row:
    return {**asdict(case), "rival": rival.name, "method": rival.method, "status": ""}


def _add_ratios(rows: dict[str, Row]) -> None:
    floor = rows[FLOOR]
    for row in rows.values():
        if row["status"] == "ok" and floor["status"] == "ok":
            row["ratio"] = row["both_us"] / floor["both_us"]
            if row["peak_mib"] is not None:
                row["memory_ratio"] = row["peak_mib"] / floor["peak_mib"]
