"""Where the time goes: the device time of each kernel of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.harness.memory import release
from benchmarks.harness.profiling import kernel_times
from benchmarks.harness.rows import reported
from benchmarks.projector.cases import Case, draw
from benchmarks.projector.rivals import FLOOR, OURS, select
from benchmarks.projector.rivals.layer import Step
from benchmarks.projector.rows import ProjectorRow


@dataclass
class PreparedBreakdown:
    """A step of ProDiaL and one of the floor, which have run."""

    device: str
    rows: dict[str, ProjectorRow]
    steps: dict[str, Step] = field(default_factory=dict)

    def measure(self) -> list[ProjectorRow]:
        """Return a row with ``kernels_us`` for each of the two."""
        for name, step in self.steps.items():
            with reported(self.rows[name]):
                self.rows[name].kernels_us = kernel_times(step.both, self.device)
                self.rows[name].status = "ok"
        return list(self.rows.values())


def prepare_breakdown(case: Case, device: str) -> PreparedBreakdown:
    """Compile and run both on one case."""
    release(device)
    chosen = select([FLOOR, OURS])
    prepared = PreparedBreakdown(
        device, {rival.name: ProjectorRow.of(case, rival.name) for rival in chosen}
    )
    for rival in chosen:
        with reported(prepared.rows[rival.name]):
            step = Step.on(draw(case, device), rival.prepare)
            step.both()
            prepared.steps[rival.name] = step
    return prepared
