"""What of the suite only a GPU can try: graphs, the allocator's figures, compiling beforehand."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.harness.pool import WorkerPool
from benchmarks.harness.timing import Replay
from benchmarks.jobs import Job
from benchmarks.projector.cases import Case
from benchmarks.projector.measure import BARE, QUICK, Settings, measure_case
from benchmarks.projector.rivals import RIVALS
from benchmarks.projector.roofline import (
    Ceilings,
    CeilingsTask,
    add_roofline,
    copier,
    measure_ceilings,
)
from benchmarks.projector.rows import ProjectorRow

pytestmark = pytest.mark.gpu

CASE = Case(512, 768, 1536, p=12)


def test_every_rival_is_measured() -> None:
    rows = {row.rival: row for row in measure_case(CASE, RIVALS, "cuda", Settings(rounds=5))}
    assert {name: row.status for name, row in rows.items() if row.status != "ok"} == {}
    for row in rows.values():
        assert row.both_us > row.forward_us > 0
        assert row.peak_mib >= row.held_mib > 0
        assert row.eager_us > 0
    assert rows["frozen"].ratio == 1
    assert rows["frozen"].kept_mib == 0


@pytest.mark.alone
def test_no_projector_beats_the_ceilings() -> None:
    ceilings = measure_ceilings("cuda", torch.bfloat16)
    assert 1e14 < ceilings.flops < 1e16
    assert 1e11 < ceilings.bandwidth < 2e13
    compared = [rival for rival in RIVALS if rival.name in ("frozen", "prodial")]
    for row in measure_case(CASE, compared, "cuda", Settings(rounds=5)):
        add_roofline(row, ceilings)
        assert 0 < row.roofline_fraction < 1.05


def test_the_ceiling_of_bandwidth_copies_all() -> None:
    source = torch.randn(4096 * 3 + 5, device="cuda")
    target = torch.full_like(source, torch.nan)
    copier(source, target)()
    assert torch.equal(source, target)


@pytest.mark.alone
def test_a_replay_costs_what_its_steps_cost() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)

    def once() -> None:
        torch.mm(a, a, out=out)

    def thrice() -> None:
        for _ in range(3):
            torch.mm(a, a, out=out)

    for step in (once, thrice):
        step()
    single, triple = (Replay([step], "cuda") for step in (once, thrice))
    single.sample()
    # The least of several: the clocks may still be rising.
    samples = [(triple.sample(), single.sample()) for _ in range(7)]
    most, least = (min(taken) for taken in zip(*samples, strict=True))
    assert most / least == pytest.approx(3, rel=0.25)


def test_workers_prepare_and_measure() -> None:
    jobs: list[Job | CeilingsTask] = [
        CeilingsTask("bfloat16"),
        Job("table", CASE, ("frozen", "prodial", "materialised-compiled"), QUICK),
        Job("variants", replace(CASE, p=1), ("frozen", "prodial"), BARE),
        Job("breakdown", CASE, ("frozen", "prodial")),
    ]
    done: dict[Job | CeilingsTask, list[ProjectorRow | Ceilings]] = {}
    with WorkerPool[Job | CeilingsTask](2, "cuda", 8 << 30) as pool:
        until = time.monotonic() + 300
        assert pool.run(jobs, until, lambda job, rows: done.update({job: [*rows]})) == []
    assert list(done) == jobs
    assert {row.status for rows in done.values() for row in rows} == {"ok"}
    assert done[jobs[3]][1].kernels_us
    assert done[jobs[0]][0].flops > 1e14
