"""A slower kernel is flagged by the comparison of two versions; noise is not."""

from __future__ import annotations

import random
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import jobs
from benchmarks.compare import ComparisonError, checked_out, compare, comparison_table, judge
from benchmarks.harness.environment import ROOT, git
from benchmarks.harness.process import WorkerError
from benchmarks.jobs import Job
from benchmarks.projector.cases import TINY
from benchmarks.projector.measure import BARE
from benchmarks.projector.rivals import FLOOR, OURS, RIVALS
from benchmarks.projector.rivals.plain import adapted, formula


def rounds(ours: float, floor: float, noise: float) -> list[dict[str, float]]:
    draw = random.Random(0)
    return [
        {name: us * draw.uniform(1 - noise, 1 + noise) for name, us in
         (("prodial", ours), ("frozen", floor))}
        for _ in range(10)
    ]  # fmt: skip


def test_a_slower_version_is_called_slower() -> None:
    verdict = judge("case", rounds(100, 50, 0.01), list(reversed(rounds(110, 50, 0.01))))
    assert verdict.word == "slower"
    assert verdict.ratio == pytest.approx(1.1, rel=0.02)
    assert "SLOWER" in comparison_table([verdict], "main")


def test_a_faster_version_is_called_faster() -> None:
    assert judge("case", rounds(100, 50, 0.01), rounds(80, 50, 0.01)).word == "faster"


def test_a_small_difference_is_noise() -> None:
    assert judge("case", rounds(100, 50, 0.0), rounds(102, 50, 0.0)).word == "same"


def test_what_the_control_shows_too_is_noise() -> None:
    # The second process runs everything 10% slower: a clock, not a kernel.
    verdict = judge("case", rounds(100, 50, 0.0), rounds(110, 55, 0.0))
    assert verdict.control == pytest.approx(1.1)
    assert verdict.word == "same"


def test_a_change_larger_than_twice_what_the_control_shows_counts() -> None:
    verdict = judge("case", rounds(100, 50, 0.0), rounds(110, 51, 0.0))
    assert verdict.noise == pytest.approx(0.04)
    assert verdict.word == "slower"


def test_a_deliberately_slowed_version_is_flagged(tmp_path: Path) -> None:
    slow = tmp_path / "prodial_kernels"
    shutil.copytree(
        ROOT / "prodial_kernels", slow, ignore=shutil.ignore_patterns("mamba2-docs", "__pycache__")
    )
    functional = slow / "functional.py"
    text = functional.read_text()
    marker = "    check_operands(x, *operands[:6], autocast=cast_to is not None)\n"
    assert marker in text
    functional.write_text(text.replace(marker, "    __import__('time').sleep(0.01)\n" + marker))
    (verdict,) = compare(ROOT, tmp_path, TINY[:1], "cpu", rounds=3)
    assert verdict.word == "slower"
    assert verdict.ratio > 3


def test_a_version_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = next(rival for rival in RIVALS if rival.name == OURS)
    twice = replace(ours, prepare=adapted(lambda *parts: 2 * formula(*parts)))
    monkeypatch.setattr(jobs, "RIVALS", (RIVALS[0], twice))
    prepared = Job("table", TINY[0], (FLOOR, OURS), BARE).prepare("cpu", nullcontext())
    with pytest.raises(RuntimeError, match=r"prodial: refused: .* relative error"):
        prepared.sample()


def test_a_worker_that_cannot_ends_the_comparison() -> None:
    class Refusing:
        def __init__(self, device: str, root: Path) -> None: ...

        def __enter__(self) -> Refusing:
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, do: str, number: int = 0, task: object = None) -> None: ...

        def prepared(self, timeout_s: float) -> None: ...

        def answer(self, timeout_s: float) -> dict[str, object]:
            raise WorkerError("prodial: refused")

    with pytest.raises(ComparisonError, match="prodial: refused"):
        compare(ROOT, ROOT, TINY[:1], "cpu", rounds=1, start=Refusing)  # type: ignore[arg-type]


def test_a_reference_is_checked_out_and_removed() -> None:
    if git("rev-parse", "HEAD") is None:
        pytest.skip("not a git repository")
    with checked_out("HEAD") as tree:
        assert (tree / "prodial_kernels" / "functional.py").exists()
        assert tree != ROOT
    assert not tree.exists()
    assert str(tree) not in (git("worktree", "list") or "")


def test_what_cannot_be_checked_out_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ComparisonError, match="expected a git reference or a folder"),
        checked_out("no-such-reference"),
    ):
        pass
    with checked_out(str(ROOT)) as tree:
        assert tree == ROOT
    with pytest.raises(ComparisonError, match="has no folder prodial_kernels"):
        compare(tmp_path, ROOT, TINY[:1], "cpu")
