"""What turns samples into figures: summaries, memory, operation counts, exponents, tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import targets
from benchmarks.harness import memory, store
from benchmarks.harness.profiling import short_name
from benchmarks.harness.timing import Replay, Summary, interleave
from benchmarks.projector import tables
from benchmarks.projector.cases import GROUPS, TABLE_SHAPES, Case, variants_of
from benchmarks.projector.rivals import RIVALS, select
from benchmarks.projector.roofline import Ceilings, work
from benchmarks.projector.rows import ProjectorRow
from benchmarks.projector.scaling import SWEEPS, exponent, fits, fits_table
from benchmarks.projector.shapes import MODELS
from benchmarks.report import charts
from benchmarks.report.record import Record


def row(case: Case, rival: str, us: float, floor_us: float, **more: Any) -> ProjectorRow:
    figures = {
        "both_us": us, "ratio": us / floor_us, "spread": 0.01, "peak_mib": 100.0,
        "memory_ratio": 1.0, "kept_mib": 1.0, "tflops": 1.0, "gbps": 1.0, "roofline_fraction": 0.5,
        "output_error": 1e-3, "gradient_error": 2e-3, "host_us": 100.0,
        "kernels_us": {"gemm_kernel": us},
    }  # fmt: skip
    return ProjectorRow.of(case, rival, "ok", **{"method": "ProDiaL", **figures, **more})


def test_summary() -> None:
    summary = Summary.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (summary.median, summary.low, summary.high, summary.count) == (3.5, 2.0, 5.0, 6)
    assert summary.spread == pytest.approx(3 / 3.5)


def test_replay_runs_every_step_and_averages_over_them() -> None:
    ran: list[int] = []
    replay = Replay([lambda: ran.append(0), lambda: ran.append(1)], "cpu")
    ran.clear()
    replay.run()
    assert ran == [0, 1] * 2
    assert replay.sample() > 0


def test_interleaving_samples_every_variant_each_round() -> None:
    replays = {name: Replay([lambda: None], "cpu") for name in "abc"}
    samples = interleave(replays, rounds=4, warm_s=0)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_kept_bytes_count_each_storage_once_and_leave_out_the_weight() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = x @ weight
        return (hidden * hidden).sin()  # keeps x, hidden and its square

    assert memory.kept_bytes(forward, [weight]) == 3 * 8 * 4 * 4
    used = memory.measure(forward, lambda: None, [weight], cuda=False)
    assert used.peak is None
    assert used.kept == 3 * 8 * 4 * 4 / 2**20


def test_work_counts() -> None:
    case = Case(64, 24, 40, p=2, r=4)
    m, k, n = case.shape
    floor = work(case, "frozen")
    assert floor.flops == 4 * m * n * k
    assert floor.bytes == 2 * 2 * (m * k + n * k + m * n)
    ours = work(case, "ProDiaL")
    assert ours.flops == floor.flops + 3 * m * n + 6 * m * 4 * (n + k) + 6 * m * k * 2
    assert ours.bytes == floor.bytes + 2 * (m * k + m * n)
    assert floor.floor_us(Ceilings(1e12, 1e30)) == pytest.approx(floor.flops / 1e6)
    assert floor.floor_us(Ceilings(1e30, 1e12)) == pytest.approx(floor.bytes / 1e6)


def test_kernel_names() -> None:
    assert short_name("void at::native::vectorized_kernel<4, at::Add>(int)") == "vectorized_kernel"
    assert short_name("gemm_kernel") == "gemm_kernel"


def test_exponent() -> None:
    assert exponent([(2, 8), (4, 32), (8, 128)]) == pytest.approx(2)
    with pytest.raises(ValueError, match="at least two sizes"):
        exponent([(2, 8)])


@pytest.mark.parametrize(("power", "faster"), [(1.0, False), (1.2, True)])
def test_growing_faster_than_the_floor_is_said(power: float, faster: bool) -> None:
    rows = []
    for case in SWEEPS["m"]:
        floor = 10 * case.m / 512
        rows.append(row(case, "frozen", floor, floor))
        rows.append(row(case, "prodial", 14 * (case.m / 512) ** power, floor))
    found = {fit.figure: fit for fit in fits(rows, {"m": SWEEPS["m"]})}
    assert found["time"].ours == pytest.approx(power)
    assert found["time"].floor == pytest.approx(1)
    assert found["time"].grows_faster is faster
    assert ("grows faster" in fits_table(list(found.values()))) is faster


def test_the_table_of_targets_marks_what_misses() -> None:
    good, bad = TABLE_SHAPES[:2]
    rows = [
        row(good, "frozen", 35, 35), row(good, "prodial", 1.7 * 35, 35),
        row(good, "concat", 2.0 * 35, 35), row(good, "lora", 3.0 * 35, 35),
        row(replace(good, p=12), "prodial", 1.7 * 1.2 * 35, 35, part="variants"),
        row(replace(good, r=64), "prodial", 1.7 * 1.1 * 35, 35, part="variants"),
        row(bad, "frozen", 21, 21), row(bad, "prodial", 2.9 * 21, 21, host_us=400.0),
        row(bad, "concat", 2.5 * 21, 21),
    ]  # fmt: skip
    head, _, first, second, *_ = tables.targets_table(rows, "NVIDIA H100").splitlines()
    assert [cell.strip() for cell in head.split("|")][1:6] == [
        "M,K,N,r", "frozen µs", "must", "aim", "ProDiaL",
    ]  # fmt: skip
    assert [cell.strip() for cell in first.split("|")][1:-1] == [
        "2048,768,3072,16", "35.0", "2.10", "1.60", "1.70", "must", "concat 2.00", "", "1.20!", "–",
        "–", "1.10", "1.00", "100",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.split("|")][5:9] == ["2.90", "!", "concat 2.50", "!"]
    assert "400!" in second


def test_targets_cover_the_table() -> None:
    first, _ = targets.of_projector("NVIDIA H100 80GB HBM3")
    assert set(first) == {(*case.shape, case.r) for case in TABLE_SHAPES}
    later, host_us = targets.of_projector("NVIDIA H200")
    assert set(first) < set(later) == {(*case.shape, case.r) for case in GROUPS["all"]}
    rows = [row(replace(TABLE_SHAPES[4], r=64), "prodial", 12.3, 10, host_us=host_us + 1)]
    line = tables.targets_table(rows, "NVIDIA H200").splitlines()[2]
    assert [cell.strip() for cell in line.split("|")][1:7] == [
        "8192,2048,8192,64", "–", "1.22", "1.15", "1.23", "!",
    ]  # fmt: skip
    assert "351!" in line
    rows[0].ratio = None
    without_floor = tables.targets_table(rows, "NVIDIA H200").splitlines()[2]
    assert [cell.strip() for cell in without_floor.split("|")][5:7] == ["–", ""]


def test_variants_divide() -> None:
    variants = [variant for case in TABLE_SHAPES for variant in variants_of(case)]
    assert len(variants) == 4 * len(TABLE_SHAPES)
    assert all(case.k % case.p == 0 for case in variants)
    assert {case.p for case in variants if case.k == 768} == {1, 12, 24, 48}
    assert {case.p for case in variants if case.k == 2048} == {1, 16, 32, 64}


def test_shapes_of_models() -> None:
    assert MODELS["mamba-130m"].in_proj == (768, 3072)
    assert MODELS["mamba2-130m"].in_proj == (768, 3352)
    assert MODELS["mamba2-2.7b"].in_proj == (2560, 10576)
    assert MODELS["falcon-mamba-7b"].out_proj == (8192, 4096)
    assert MODELS["vim-tiny"].in_proj == (192, 768)


def test_selecting_rivals() -> None:
    assert [rival.name for rival in select(["concat"])] == ["frozen", "concat"]
    assert [rival.name for rival in select(strong=True)] == [
        "frozen", "prodial", "concat", "materialised-compiled",
    ]  # fmt: skip
    assert len(select()) == len(RIVALS) == len({rival.name for rival in RIVALS})
    with pytest.raises(ValueError, match="got nonsense"):
        select(["nonsense"])


def record_of(rows: list[ProjectorRow], **more: Any) -> Record:
    versions = {"torch": "2", "triton": "3"}
    environment = {"device": "A GPU (80 GB)", "versions": versions, "date": "2026-01-02"}
    return Record("projector", environment, rows=rows, **more)


def test_results_are_written_and_read(tmp_path: Path) -> None:
    sweeps = {"m": list(SWEEPS["m"])}
    rows = [row(TABLE_SHAPES[0], "frozen", 35, 35)]
    record = record_of(rows, ceilings=Ceilings(1e15, 1e12), sweeps=sweeps)
    assert store.results_of(record.environment["device"]).name == "a-gpu-80-gb"
    as_json, as_csv, as_page = record.write(tmp_path, "a page")
    assert as_json.name == "projector.json"
    assert Record.read(as_json) == record
    assert as_page.read_text() == "a page\n"
    head, line = as_csv.read_text().splitlines()
    assert head.split(",")[:3] == ["m", "k", "n"]
    assert "kernels_us" not in head
    assert line.startswith("2048,768,3072,1,16,bfloat16")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a result"):
        Record.read(tmp_path / "other.json")


def test_pictures(tmp_path: Path) -> None:
    rows = [
        row(case, name, us, 35)
        for case in TABLE_SHAPES
        for name, us in (("frozen", 35), ("prodial", 50), ("concat", 60), ("peft-oft", 400))
    ]
    made = charts.draw_all(record_of(rows), tmp_path)
    assert [path.stem.removeprefix("projector-") for path in made] == [
        "cost", "time-memory", "kernels",
    ]  # fmt: skip
    sweep = {"m": SWEEPS["m"]}
    rows = [row(case, name, case.m, 35) for case in SWEEPS["m"] for name in ("frozen", "prodial")]
    assert "scaling" in charts.draw_all(record_of(rows, sweeps=sweep), tmp_path)[0].stem
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
