"""One row for each case and rival: checked, then time, memory and error together.

Preparing a case compiles, checks and records; processes may do it side by side. Measuring it is
for a quiet device.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from benchmarks.harness import memory
from benchmarks.harness.environment import cache_bytes
from benchmarks.harness.memory import release
from benchmarks.harness.rows import Unavailable, reported
from benchmarks.harness.timing import Replay, Summary, eager_time, host_time, interleave
from benchmarks.projector.cases import Case, draw, rotating_sets
from benchmarks.projector.checks import CorrectnessCheck, Errors
from benchmarks.projector.rivals import Rival
from benchmarks.projector.rivals.layer import Step
from benchmarks.projector.roofline import work
from benchmarks.projector.rows import ProjectorRow, add_ratios
from prodial_kernels.testing import LinearCase


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
    """A rival that passed its check on a case, with its operand sets and recorded replays."""

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
    rows: dict[str, ProjectorRow]
    contenders: list[Contender] = field(default_factory=list)

    def measure(self) -> list[ProjectorRow]:
        """Time what passed, interleaved; return a row for each rival, in their order."""
        timed = {c.rival.name: c.both for c in self.contenders}
        timed |= {f"{c.rival.name} forward": c.forward for c in self.contenders if c.forward}
        samples = interleave(timed, self.settings.rounds, self.settings.warm_s)
        for contender in self.contenders:
            name = contender.rival.name
            row = self.rows[name]
            with reported(row):
                fill(row, contender, samples[name], samples.get(f"{name} forward"))
                if self.settings.eager:
                    step = contender.steps[0].both
                    row.eager_us = eager_time(step, self.device, self.settings.budget_s)
                    row.host_us = host_time(step, self.device, self.settings.budget_s)
                row.status = "ok"
        add_ratios(self.rows)
        return list(self.rows.values())

    def sample(self) -> dict[str, float]:
        """One figure for each rival; the first sample after waiting is not taken.

        Raises:
            RuntimeError: One of them was refused or failed.
        """
        for row in self.rows.values():
            if row.status:
                raise RuntimeError(f"{row.rival}: {row.status}")
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
        case, device, settings,
        {rival.name: ProjectorRow.of(case, rival.name, method=rival.method) for rival in rivals},
    )  # fmt: skip
    sets: list[LinearCase] = []
    check: CorrectnessCheck | None = None
    pool = _pool(device)
    for rival in rivals:
        row = prepared.rows[rival.name]
        with reported(row):
            if reason := rival.missing():
                raise Unavailable(reason)
            if check is None:
                check = CorrectnessCheck(case, device)
                count = rotating_sets(case, cache_bytes(device))
                sets = [draw(case, device, seed) for seed in range(count)]
            steps = [Step.on(operands, rival.prepare) for operands in sets]
            for step in steps:
                step.both()
            with alone:
                errors = check.errors_of(rival)
                # Not also a collection, which takes longer than the check once a compiler is there.
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
            prepared.contenders.append(_record(steps, rival, errors, device, pool, settings))
        if row.status:
            # A recording that failed leaves its pool unusable; what it held is freed here.
            pool = _pool(device)
            with reported():
                release(device)
    return prepared


def measure_case(
    case: Case, rivals: Sequence[Rival], device: str, settings: Settings
) -> list[ProjectorRow]:
    """Prepare and measure one case in this process."""
    return prepare_case(case, rivals, device, settings).measure()


def fill(
    row: ProjectorRow,
    contender: Contender,
    both: Sequence[float],
    forward: Sequence[float] | None,
) -> None:
    """Turn samples into the figures of a row."""
    summary = Summary.of(both)
    needed = work(row.case, row.method)
    used, errors = contender.memory, contender.errors
    row.both_us, row.both_low_us, row.both_high_us = summary.median, summary.low, summary.high
    row.spread, row.samples = summary.spread, summary.count
    row.peak_mib, row.held_mib, row.kept_mib = used.peak, used.held, used.kept
    row.tflops = needed.flops / summary.median / 1e6
    row.gbps = needed.bytes / summary.median / 1e3
    row.output_error, row.gradient_error = errors.output, errors.gradient
    row.worst_gradient, row.unrounded_error = errors.worst, errors.unrounded
    if forward is not None:
        row.forward_us = Summary.of(forward).median
        # The backward is not recorded alone: it needs its forward's tensors.
        row.backward_us = summary.median - row.forward_us


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
