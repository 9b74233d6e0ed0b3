"""The README files show what the committed results say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import values_of
from benchmarks.models.rows import ModelRow
from benchmarks.projector.cases import TABLE_SHAPES
from benchmarks.projector.rows import ProjectorRow
from benchmarks.report import charts
from benchmarks.report.record import Record
from benchmarks.training import table
from benchmarks.training.jobs import JOBS, TINY_JOBS, JobRow
from benchmarks.training.learning.curves import CurveRow
from benchmarks.training.learning.in_fp8 import LearningRow
from benchmarks.training.promise import Row

ENVIRONMENT = {
    "device": "A GPU", "driver": "1", "commit": "abc", "date": "2026-01-02", "command": "run",
    "versions": {"torch": "2", "triton": "3", "numpy": "1", "mamba-ssm": None},
}  # fmt: skip


def row(rival: str, us: float, **more: Any) -> ProjectorRow:
    figures = {
        "both_us": us, "ratio": us / 40, "memory_ratio": 1.05, "spread": 0.01, "peak_mib": 10.0,
        "roofline_fraction": 0.5, "output_error": 1e-3, "gradient_error": 1e-3,
    }  # fmt: skip
    return replace(ProjectorRow.of(TABLE_SHAPES[0], rival, "ok"), **{**figures, **more})


ROWS = [
    row("frozen", 40), row("prodial", 60), row("concat", 70), row("peft-lora", 100),
    row("prodial", 66, p=12, part="variants"),
    ProjectorRow.of(TABLE_SHAPES[0], "authors", "failed: OutOfMemoryError: x"),
]  # fmt: skip
RECORD = Record("full", ENVIRONMENT, rows=ROWS)


def trained(name: str = "tiny", budget: str | None = None, **more: Any) -> dict[str, Any]:
    job = next(job for job in (*TINY_JOBS, *JOBS) if job.name == name)
    row = JobRow(**{
        **asdict(job), "title": job.title, "command": job.command(budget), "ms": 12.34,
        "memory_budget": budget, "peak_bytes": 5_000_000_000, "predicted_bytes": 5_120_000_000,
        "levels": {"checkpoint": 3, "keep": 1}, "graphed": True, **more,
    })  # fmt: skip
    return values_of(row)


def model(variant: str, ms: float, length: int = 512) -> dict[str, Any]:
    ratios = {"time_ratio": ms / 10, "memory_ratio": ms / 10}
    row = ModelRow("mamba-130m", 4, length, variant, "ok", ms, 100 * ms, **ratios)
    return values_of(row)


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_show_the_committed_results(page: str) -> None:
    text = (readme.ROOT / page).read_text()
    assert readme.rendered(text, page) == text, "run python -m benchmarks.run --render"


def test_what_is_committed_loads() -> None:
    kinds = {"curves": CurveRow, "finetune": JobRow} | dict.fromkeys(
        ("methods", "mixers", "trainer"), ModelRow
    )
    kinds |= {"learning": LearningRow, "promise": Row}
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        if path.stem == "distributed":
            assert all(part["rows"] for part in json.loads(path.read_text())["parts"].values())
        elif kind := kinds.get(path.stem.split("-")[0]):
            assert [kind(**row) for row in json.loads(path.read_text())["rows"]]
        else:
            assert Record.read(path).rows


def test_one_line_for_each_projector_in_fp8() -> None:
    rows = [row("frozen", 40), row("prodial", 60)]
    rows.append(row("prodial-fp8", 44, output_error=0.016, unrounded_error=0.037))
    text = readme.in_fp8(Record("fp8-only", ENVIRONMENT, rows=rows))
    (line,) = [line for line in text.splitlines() if TABLE_SHAPES[0].model in line]
    assert [part.strip() for part in line.split("|")][4:-1] == [
        "40", "1.50", "1.10", "–", "1.05", "1.6%", "3.7%",
    ]  # fmt: skip


def test_what_was_learned_in_fp8() -> None:
    rows = [
        {"method": m, "seed": seed, "compute": c, "held_out": [[0, 4.0], [1000, 2.0 + seed]],
         "cosine": [[0, 0.95]] if c == "fp8" else []}
        for m in ("prodial", "lora") for seed in range(2) for c in ("same", "fp8")
    ]  # fmt: skip
    text = readme.learned({**ENVIRONMENT, "rows": rows})
    assert "1,000 steps" in text
    assert "prodial: held-out 2.5000" in text
    assert "0.9500 to 0.9500" in text


def test_one_line_for_each_projector_of_the_table() -> None:
    text = readme.projectors(RECORD)
    (line,) = [line for line in text.splitlines() if line.startswith("| mamba-130m")]
    assert [cell.strip() for cell in line.split("|")][1:-1] == [
        "mamba-130m in_proj", "2,048", "768 → 3072", "40", "1.50", "1.75 (concat)", "2.50", "–",
        "1.05",
    ]  # fmt: skip
    assert "r = 16, 1×1 blocks, bfloat16, on an A GPU" in text
    assert text.endswith("`run`, torch 2, triton 3, 2026-01-02.")


def test_one_line_for_each_model() -> None:
    rows = [model("frozen", 10), model("prodial", 12), model("lora-slow", 20)]
    rows.append({**model("authors", 1), "status": "failed: x"})
    text = readme.models({**ENVIRONMENT, "rows": rows, "notes": ["A note."], "dropped": ["a", "b"]})
    assert "A note." in text
    assert "Dropped, as the time was over: a; b." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| mamba-130m")]
    assert [cell.strip() for cell in line.split("|")][1:-1] == [
        "mamba-130m", "4 × 512", "10.0 ms, 1,000 MiB", "1.20, 1.20", "2.00, 2.00",
    ]  # fmt: skip


def test_render_draws_and_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "benchmarks" / "results" / "a-gpu"
    RECORD.write(folder, "")
    steps = [model(variant, 10, 256) for variant in ("frozen", "prodial")]
    steps += [model(variant, 11) for variant in ("frozen", "prodial", "lora-slow", "authors")]
    (folder / "mixers.json").write_text(json.dumps({**ENVIRONMENT, "rows": steps}))
    costs = [model("frozen", 10), model("affix", 12), model("affix-slow", 20)]
    (folder / "methods.json").write_text(json.dumps({**ENVIRONMENT, "rows": costs}))
    jobs = [trained("tiny", "6GB"), trained("1.4b-bf16", "8GB")]
    (folder / "finetune.json").write_text(json.dumps({**ENVIRONMENT, "rows": jobs}))
    speed = {
        "model": "m", "processes": 1, "way": "", "ms": 1.0, "tokens_per_second": 77.0,
        "peak_gb": 1.0,
    }  # fmt: skip
    scaling = {**ENVIRONMENT, "processes": 2, "rows": [speed]}
    (folder / "distributed.json").write_text(json.dumps({"parts": {"scaling": scaling}}))
    for name, parts in readme.PAGES.items():
        page = tmp_path / name
        page.parent.mkdir(parents=True, exist_ok=True)
        marked = (f"<!-- {part}: begin -->\nOLD\n<!-- {part}: end -->" for part in parts)
        page.write_text("\n".join(["before", *marked, "after"]))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", folder.parent)
    assert readme.render([]) == 0
    texts = {name: (tmp_path / name).read_text() for name in readme.PAGES}
    for name, text in texts.items():
        assert "OLD" not in text
        assert text.startswith("before\n")
        assert text.endswith("\nafter")
        assert readme.rendered(text, name) == text
    front, results, training, methods = texts.values()
    assert "| `affix` | 1.20, 1.20 | 2.00, 2.00" in " ".join(methods.split())
    assert "](a-gpu/full-cost.png)" in results
    assert "](a-gpu/full.md)" in results
    assert "| mamba-130m in_proj" in results
    assert "| tiny 2×32 bf16 " in training
    assert "|       77 |" in training
    assert "| mamba-1.4b 4×2048 bf16 " in front
    assert "tiny" not in front
    (line,) = [line for line in front.splitlines() if line.startswith("| mamba-130m")]
    assert "4 × 512" in line
    assert (folder / "full-cost.png").stat().st_size < 150_000
    assert "| prodial " in (folder / "full.md").read_text()
    drawn = (folder / "overview.svg").read_bytes()
    assert readme.overview() == folder / "overview.svg"
    assert (folder / "overview.svg").read_bytes() == drawn


def test_an_overview_needs_all_that_it_shows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a case of all four variants"):
        charts.overview([ModelRow(**model("frozen", 10))], [], "a GPU", tmp_path / "overview.svg")


def test_one_line_for_each_job_and_its_command() -> None:
    rows = [
        trained("tiny", "6GB", graphed=False),
        trained("130m-graphed", ms=123.4, predicted_bytes=None, levels={"keep": 24}),
        {"name": "1.4b-bf16", "error": "no memory"},
    ]
    text = table.page({"device": "A GPU", "rows": rows})
    lines = [
        [cell.strip() for cell in line.split("|")][1:-1]
        for line in text.splitlines()
        if line.startswith(("| tiny", "| mamba"))
    ]
    assert lines == [
        ["tiny 2×32 bf16, eager", "90000 ms, 9.0 GB", "12.3", "5.00 (5.12)", "6GB",
         "1 `keep`, 3 `checkpoint`"],
        ["mamba-130m 4×512 bf16, mamba_ssm", "24.2 ms", "123", "5.00", "–", "`keep`"],
    ]  # fmt: skip
    assert text.endswith(
        "```bash\nprodial finetune --model embedded --data notes.txt --batch-size 2 --seq-len 32 "
        "--memory-budget 6GB\n```"
    )


def test_a_page_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        readme.replaced("nothing", "benchmarks", "new")
