"""Where the time goes: the device time of each kernel of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.timing import synchronise
from benchmarks.projector.cases import Case, draw
from benchmarks.projector.measure import release, reported
from benchmarks.projector.rivals import FLOOR, OURS, select
from benchmarks.projector.rivals.layer import Step
from benchmarks.projector.roofline import Ceilings


@dataclass
class PreparedBreakdown:
    """A step of ProDiaL and one of the floor, which have run."""

    device: str
    rows: dict[str, dict[str, Any]]
    steps: dict[str, Step]

    def measure(self, ceilings: Ceilings) -> list[dict[str, Any]]:
        """Return a row with ``kernels_us`` for each of the two."""
        for name, step in self.steps.items():
            with reported(self.rows[name]):
                self.rows[name] |= {
                    "kernels_us": kernel_times(step.both, self.device),
                    "status": "ok",
                }
        return list(self.rows.values())


def prepare_breakdown(case: Case, device: str) -> PreparedBreakdown:
    """Compile and run both on one case."""
    release(device)
    chosen = select([FLOOR, OURS])
    rows = {rival.name: {**asdict(case), "rival": rival.name, "status": ""} for rival in chosen}
    prepared = PreparedBreakdown(device, rows, {})
    for rival in chosen:
        with reported(rows[rival.name]):
            step = Step.on(draw(case, device), rival.prepare)
            step.both()
            prepared.steps[rival.name] = step
    return prepared


def kernel_times(step: Callable[[], None], device: str, repeats: int = 5) -> dict[str, float]:
    """Return µs per step by kernel, largest first; on a CPU by operator."""
    cuda = device.startswith("cuda")
    step()
    synchronise(cuda)
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(repeats):
            step()
        synchronise(cuda)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        if took > 0:
            times[short_name(event.key)] += took / repeats
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def short_name(kernel: str) -> str:
    """A kernel's name without its template arguments and namespaces, at most 48 characters."""
    head = kernel.split("<")[0].split("(")[0].removeprefix("void ")
    return head.split("::")[-1].strip()[:48] or kernel[:48]
