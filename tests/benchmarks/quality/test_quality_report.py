"""The study's tasks on disk, its statistics, its leaderboard and its analysis of T."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality.analysis.transform import analyse, projector_weights, transform
from benchmarks.quality.bases.shapes import build
from benchmarks.quality.report.claims import judged
from benchmarks.quality.report.leaderboard import leaderboard, page, write
from benchmarks.quality.report.plots import groups_within
from benchmarks.quality.report.statistics import (
    critical_difference,
    friedman,
    mean_ranks,
    sign_flip,
    sign_test,
)
from benchmarks.quality.study.row import Row, Spec
from benchmarks.quality.tasks.signatures import make_signature
from benchmarks.quality.tasks.task import (
    SPLITS,
    ImageTask,
    TextExample,
    TextTask,
    capped,
    load_task,
    save_task,
    split_of,
)


def test_splits_are_fixed_by_hash() -> None:
    # These must never change: rows made before would no longer be comparable.
    assert [split_of(key) for key in ("apple", "pear", "plum", "fig", "date", "lime")] == PINNED
    shares = [split_of(str(i)) for i in range(5000)]
    assert abs(shares.count("train") / 5000 - 0.7) < 0.02
    assert abs(shares.count("test") / 5000 - 0.2) < 0.02
    found = capped(
        [(f"{i // 2}", i) for i in range(200)], {"train": 20, "validation": 9, "test": 9}
    )
    assert len(found["train"]) == 20
    assert all(split_of(f"{i // 2}") == split for split in SPLITS for i in found[split])


PINNED = ["test", "train", "test", "test", "test", "train"]


def test_tasks_come_back_from_disk(tmp_path: Path) -> None:
    examples = [TextExample("Straße\n", (" a", " b"), i % 2) for i in range(3)]
    text = TextTask("text", {"what": "x"}, True, dict.fromkeys(SPLITS, examples))
    entry = save_task(text, tmp_path)
    again = load_task(tmp_path, "text")
    assert again == text
    assert entry["sha256"] == save_task(text, tmp_path)["sha256"]
    assert entry["examples"] == dict.fromkeys(SPLITS, 3)
    assert entry["chance"] == 0.5
    arrays = np.arange(2 * 32 * 32, dtype=np.uint8).reshape(2, 1, 32, 32), np.array([1, 1])
    images = ImageTask("images", {"what": "y"}, ("a", "b"), dict.fromkeys(SPLITS, arrays))
    assert save_task(images, tmp_path)["chance"] == 1.0
    found = load_task(tmp_path, "images")
    assert isinstance(found, ImageTask)
    assert found.classes == ("a", "b")
    np.testing.assert_array_equal(found.splits["test"][0], arrays[0])
    with pytest.raises(ValueError, match=r"expected one of \['images', 'text'\]"):
        load_task(tmp_path, "other")


def test_sign_flips() -> None:
    # Of five differences of one sign, two patterns of 32 are as large.
    assert sign_flip([0.1, 0.2, 0.1, 0.3, 0.2]) == 2 / 32
    assert sign_flip([0.1, -0.1]) == 1.0
    many = [1.0 if i % 2 else -1.0 for i in range(20)]
    assert sign_flip(many) == 1.0
    assert sign_flip([1.0] * 20) < 1e-4
    # Binomial: 8 of 10 or more, on either side, 112 of 1024.
    assert sign_test(8, 2) == sign_test(2, 8) == 112 / 1024
    assert sign_test(3, 3) == sign_test(0, 0) == 1.0
    with pytest.raises(ValueError, match="below 0"):
        sign_test(-1, 2)
    with pytest.raises(ValueError, match="at least one"):
        sign_flip([])


def test_ranks_and_critical_differences() -> None:
    ranks = mean_ranks({"a": [0.9, 0.8], "b": [0.5, 0.8], "c": [0.1, 0.2]})
    assert ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    # Demšar 2006, section 3.2.2: four classifiers on 14 data sets.
    example = {"C4.5": 3.143, "m": 2.0, "cf": 2.893, "both": 1.964}
    assert friedman(example, 14) == pytest.approx(9.28, abs=0.02)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.01)
    assert groups_within([1.0, 1.5, 2.6, 3.0], 1.2) == [(0, 1), (1, 2), (2, 3)]
    assert groups_within([1.0, 1.5, 2.0, 9.0], 1.2) == [(0, 2)]
    with pytest.raises(ValueError, match="2 to 20 methods"):
        critical_difference(21, 3)


def rows() -> list[Row]:
    found = []
    for method, better in (("lora", 0.0), ("prodial", 0.05), ("bitfit", -0.1)):
        budget = "own" if method == "bitfit" else "medium"
        for task in ("one", "two"):
            for rate in (1e-3, 1e-2):
                spec = Spec("base", task, method, budget, rate, 0)
                found.append(Row(spec, "sweep", figures={"validation": rate}))
            for seed in range(1, 6):
                accuracy = 0.5 + better + 0.01 * seed
                figures = {
                    "validation": accuracy, "test": accuracy, "parameters": 105, "target": 100,
                    "seconds": 2.0, "tokens_per_second": 10.0, "peak_bytes": None,
                }  # fmt: skip
                spec = Spec("base", task, method, budget, 1e-2, seed)
                found.append(Row(spec, "final", figures=figures))
    spec = Spec("base", "one", "strong", "medium", 1e-3, 0)
    return [*found, Row(spec, "sweep", "unfit", note="no x_proj")]


def test_the_leaderboard_sums_up_and_draws(tmp_path: Path) -> None:
    board = leaderboard(rows(), "A toy.")
    cell = next(c for c in board["cells"] if c["method"] == "prodial" and c["task"] == "one")
    assert cell["test"] == pytest.approx(0.58)
    assert cell["test_sd"] == pytest.approx(0.01 * math.sqrt(2.5), abs=1e-5)
    assert cell["difference"] == pytest.approx(0.05)
    assert cell["p"] == pytest.approx(2 / 32, abs=1e-4)
    assert cell["edge"]
    assert cell["gap"] == 5.0
    (group,) = board["ranks"]
    assert group["ranks"] == {"prodial": 1.0, "lora": 2.0, "bitfit": 3.0}
    (claim,) = board["claims"]
    assert (claim["better"], claim["worse"], claim["pairs"]) == ("prodial", "lora", 10)
    assert claim["difference"] == pytest.approx(0.05)
    assert (claim["won"], claim["lost"], claim["cells_won"]) == (10, 0, 2)
    assert claim["p"] == pytest.approx(2 / 2**10, abs=1e-5)
    assert claim["p_cells"] == 0.5
    text = page(board)
    assert "| Table 3 | base | +5.00 ± 0.00 | 10 : 0 | 0.0020 | 2 of 2 | 0.5000 |" in text
    assert text.splitlines()[2] == "**A toy.**"
    assert (
        "| ProDiaL relu, s, 1×1 | 105 (+5%) | 58.0 ± 1.6*↑ | 58.0 ± 1.6*↑ | 58.0 | 1.00 |" in text
    )
    assert "| BitFit | 105 (+5%) | 43.0 ± 1.6*↓ |" in text
    assert "- base, strong: unfit. no x_proj" in text
    paths = write(board, tmp_path)
    assert {path.suffix for path in paths} == {".json", ".md", ".png"}
    assert json.loads((tmp_path / "leaderboard.json").read_text()) == board
    assert (tmp_path / "ranks-base-medium.png").stat().st_size > 5000


def test_a_difference_has_its_standard_errors() -> None:
    def cell(method: str, task: str, values: list[float]) -> dict[str, Any]:
        by_seed = {str(seed): value for seed, value in enumerate(values)}
        return {"base": "b", "method": method, "task": task, "budget": "medium", "status": "ok",
                "values": by_seed}  # fmt: skip

    cells = [cell("lora", task, [0.5, 0.5]) for task in ("one", "two")]
    cells += [cell("prodial", "one", [0.5, 0.52]), cell("prodial", "two", [0.54, 0.56])]
    (claim,) = judged(cells)
    # Differences 0, 2, 4 and 6 points; 1 and 5 by task.
    assert claim["difference"] == pytest.approx(0.03)
    assert claim["error"] == pytest.approx(math.sqrt(20 / 3) / 2 / 100, abs=1e-5)
    assert claim["error_cells"] == pytest.approx(0.02)


def test_a_task_that_was_only_begun_is_left_out_of_ranks() -> None:
    begun = Row(Spec("base", "three", "lora", "medium", 1e-2, 1), "final")
    begun.figures = {**rows()[-2].figures}
    (group,) = leaderboard([*rows(), begun])["ranks"]
    assert group["tasks"] == ["one", "two"]
    assert len(group["ranks"]) == 3


def test_T_is_found_where_there_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    T = torch.eye(5) + 0.1 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(transform(W, W @ T), T)
    torch.testing.assert_close(transform(W, W @ T), torch.linalg.pinv(W) @ W @ T)
    # A wide W: the identity where nothing was trained, and W T = W' all the same.
    wide = W.mT
    torch.testing.assert_close(transform(wide, wide), torch.eye(12, dtype=torch.float64))
    changed = wide + 0.1 * torch.randn(5, 12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(wide @ transform(wide, changed), changed)
    with pytest.raises(ValueError, match="of one shape"):
        transform(W, wide)


def test_the_analysis_tells_a_diagonal_change_from_another(tmp_path: Path) -> None:
    model = build("mamba2-toy", 48)
    before = {k: v.clone() for k, v in projector_weights(model).items()}
    with pytest.raises(ValueError, match="unchanged"):
        analyse(before, before, tmp_path)
    generator = torch.Generator().manual_seed(0)
    scaled = {
        k: v * (1 + 0.1 * torch.randn(v.shape[1], generator=generator)) for k, v in before.items()
    }
    noisy = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in before.items()}
    diagonal = analyse(before, scaled, tmp_path)["mean"]["in_proj"]
    assert diagonal["share"] == pytest.approx(1.0, abs=1e-4)
    assert diagonal["by_diagonal"] == pytest.approx(1.0, abs=1e-4)
    other = analyse(before, noisy, tmp_path)["mean"]["in_proj"]
    # Noise has no structure: the yardsticks say what it gives.
    for name in ("share", "explained", "by_diagonal"):
        assert other[name] == pytest.approx(other[f"even_{name}"], abs=0.06)
    assert (tmp_path / "transform-in_proj.png").stat().st_size > 5000
    assert (tmp_path / "transform-out_proj.png").stat().st_size > 5000


def test_the_task_of_signatures_is_the_same_in_every_process(tmp_path: Path) -> None:
    task = make_signature("signature", tmp_path)
    assert task == make_signature("signature", tmp_path)
    examples = [example for split in SPLITS for example in task.splits[split]]
    assert len(examples) > 1000
    assert all(len(set(e.choices)) == len(e.choices) for e in examples)
    right = {e.prompt.splitlines()[-1]: e.choices[e.answer] for e in examples}
    assert right["textwrap.dedent("] == "text)"
    places = [e.answer for e in examples]
    # The right one is at no place more often than at another.
    assert max(places.count(i) for i in range(4)) < 0.3 * len(places)
