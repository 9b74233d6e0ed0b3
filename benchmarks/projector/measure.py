"""One row for each case and rival: gate, then time, memory, roofline and error together.

Preparing a case compiles, checks and records; processes may do it side by side. Measuring it is
for a quiet device.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.harness import memory
from benchmarks.harness.environment import cache_bytes
from benchmarks.harness.timing import Replay, Summary, eager_time, host_time, interleave
from benchmarks.projector.cases import Case, draw, rotating_sets
from benchmarks.projector.gate import Errors, Gate, Refusal
from benchmarks.projector.rivals import FLOOR, Rival
from benchmarks.projector.rivals.layer import Step
from benchmarks.projector.roofline import Ceilings, work
from prodial_kernels.testing import LinearCase

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        rounds: Samples of each variant.
        forward: Time the forward alone too.
        eager: Measure eager wall time and host time.
        warm_s: Seconds of work before the first sample of a case.
        budget_s: Seconds to spend on each of eager and host time.
    """

    rounds: int = 15
    forward: bool = True
    eager: bool = True
    warm_s: float = 0.2
    budget_s: float = 0.08


FULL = Settings()
QUICK = Settings(rounds=12, forward=False, warm_s=0.1, budget_s=0.05)
BARE = Settings(rounds=12, forward=False, eager=False, warm_s=0.1)
TINY = Settings(rounds=3, warm_s=0.0, budget_s=0.01)


@dataclass
class Contender:
    """A rival that passed the gate on a case, with its operand sets and recorded replays."""

    rival: Rival
    errors: Errors
    steps: list[Step]
    both: Replay
    forward: Replay | None
    memory: memory.Memory


@dataclass
class PreparedCase:
    """A case whose rivals are compiled, checked and recorded, or have a reason in their row."""

    case: Case
    device: str
    settings: Settings
    rows: dict[str, Row]
    contenders: list[Contender] = field(default_factory=list)

    def measure(self, ceilings: Ceilings) -> list[Row]:
        """Time what passed, interleaved; return a row for each rival, in their order."""
        timed = {c.rival.name: c.both for c in self.contenders}
        timed |= {f"{c.rival.name} forward": c.forward for c in self.contenders if c.forward}
        samples = interleave(timed, self.settings.rounds, self.settings.warm_s)
        for contender in self.contenders:
            name = contender.rival.name
            row = self.rows[name]
            with reported(row):
                row |= figures(
                    self.case, contender, samples[name], samples.get(f"{name} forward"), ceilings
                )
                if self.settings.eager:
                    step = contender.steps[0].both
                    row["eager_us"] = eager_time(step, self.device, self.settings.budget_s)
                    row["host_us"] = host_time(step, self.device, self.settings.budget_s)
        add_ratios(self.rows)
        return list(self.rows.values())

    def sample(self) -> dict[str, float]:
        """One figure for each rival; the first sample after waiting is not taken."""
        self.contenders[0].both.sample()
        return {
            contender.rival.name: statistics.median(contender.both.sample() for _ in range(3))
            for contender in self.contenders
        }


def prepare_case(
    case: Case,
    rivals: Sequence[Rival],
    device: str,
    settings: Settings,
    alone: AbstractContextManager[object] | None = None,
) -> PreparedCase:
    """Compile, check and record every rival on one case.

    A refused, missing or failing one gets its reason as the status of its row.

    Args:
        case: The case.
        rivals: What to prepare; the floor among them, if ratios are wanted.
        device: Where.
        settings: What will be measured.
        alone: Entered for what takes several times a case's memory, so that processes which
            prepare side by side do so one after the other.
    """
    release(device)
    alone = nullcontext() if alone is None else alone
    prepared = PreparedCase(
        case, device, settings, {rival.name: _row(case, rival) for rival in rivals}
    )
    sets: list[LinearCase] = []
    gate: Gate | None = None
    pool = _pool(device)
    for rival in rivals:
        row = prepared.rows[rival.name]
        with reported(row):
            if reason := rival.missing():
                raise Unavailable(reason)
            if gate is None:
                gate = Gate(case, device)
                count = rotating_sets(case, cache_bytes(device))
                sets = [draw(case, device, seed) for seed in range(count)]
            steps = [Step.on(operands, rival.prepare) for operands in sets]
            for step in steps:
                step.both()
            with alone:
                errors = gate.check(rival)
                # Not also a collection, which takes longer than the check once a compiler is there.
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
            prepared.contenders.append(_record(steps, rival, errors, device, pool, settings))
        if row["status"]:
            # A recording that failed leaves its pool unusable; what it held is freed here.
            pool = _pool(device)
            with reported({}):
                release(device)
    return prepared


def measure_case(
    case: Case, rivals: Sequence[Rival], device: str, ceilings: Ceilings, settings: Settings
) -> list[Row]:
    """Prepare and measure one case in this process."""
    return prepare_case(case, rivals, device, settings).measure(ceilings)


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
        row["status"] = failure(error)


def failure(error: BaseException) -> str:
    """The status of a row whose figure could not be had."""
    # What follows the first lines of a CUDA error is the same advice every time.
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:200]}"


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
        **{f"{name}_mib": value for name, value in asdict(contender.memory).items()},
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


def add_ratios(rows: dict[str, Row]) -> None:
    """Add time and memory over the floor's, where both were measured."""
    floor = rows.get(FLOOR, {"status": ""})
    for row in rows.values():
        if row["status"] == "ok" and floor["status"] == "ok":
            row["ratio"] = row["both_us"] / floor["both_us"]
            if row["peak_mib"] is not None:
                row["memory_ratio"] = row["peak_mib"] / floor["peak_mib"]


def release(device: str, *, workspaces: bool = False) -> None:
    """Give the device back what is no longer referred to.

    Args:
        device: Where.
        workspaces: cuBLAS's too, of which it keeps one of 32 MiB for every stream it has seen; what
            ran before would count for a peak otherwise.
    """
    gc.collect()
    if device.startswith("cuda"):
        if workspaces:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _record(
    steps: list[Step],
    rival: Rival,
    errors: Errors,
    device: str,
    pool: object,
    settings: Settings,
) -> Contender:
    """Measure the memory of a step that has run, and record what will be replayed."""
    first = steps[0]
    own = [first.weight, *first.layer.trained.values()]
    used = memory.measure(first.forward, first.both, own, device.startswith("cuda"))
    forward = None
    if settings.forward:
        forward = Replay([step.forward_only for step in steps], device, pool)
    both = Replay([step.both for step in steps], device, pool)
    return Contender(rival, errors, steps, both, forward, used)


def _pool(device: str) -> object:
    """Memory that the graphs of one case share; they are never replayed at the same time."""
    return torch.cuda.graph_pool_handle() if device.startswith("cuda") else None


def _row(case: Case, rival: Rival) -> Row:
    return {**asdict(case), "rival": rival.name, "method": rival.method, "status": ""}
