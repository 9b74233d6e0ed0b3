"""Rows of the study: one toy row end to end, on disk, resumed, and made again from its seed."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality.bases.shapes import build, save_base
from benchmarks.quality.side_by_side.runner import run_stacks
from benchmarks.quality.study.row import Recipe, Row, Spec, append, read_rows
from benchmarks.quality.study.runner import Plan, chosen_rate, run
from benchmarks.quality.tasks.task import ImageTask, TextExample, TextTask, save_task
from support.tiny_model import byte_tokenizer

CPU = torch.device("cpu")
RECIPE = Recipe(steps=30, batch_size=8)


def parity(count: int, first: int) -> list[TextExample]:
    """Prompts whose last letter says the answer: learnt at once, unknown to random weights."""
    answers = [(first + 7 * i) % 3 for i in range(count)]
    return [
        TextExample(f"{i % 10}{'xyz'[answer]}", (" one", " two", " six"), answer)
        for i, answer in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with random weights and a task, on disk."""
    folder = tmp_path_factory.mktemp("language")
    source = folder / "tokenizer"
    byte_tokenizer().save_pretrained(source)
    card = {"name": "toy", "kind": "language", "shape": "mamba2-toy"}
    save_base(build("mamba2-toy", 264), folder / "base", card, source)
    task = TextTask("letters", {"what": "a toy"}, False)
    task.splits = {"train": parity(48, 0), "validation": parity(12, 1), "test": parity(18, 2)}
    save_task(task, folder / "tasks")
    return folder / "base", folder / "tasks"


@pytest.fixture(scope="module")
def rows(language: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one method, and of the base as it is."""
    folder = tmp_path_factory.mktemp("rows")
    plan = Plan(str(language[0]), ["letters"], ["lora", "none"], ["medium"], 2, RECIPE)
    made = run(plan, language[1], folder, device=CPU, say=lambda line: None)
    assert made == (4 + 2) + (1 + 1)
    return folder


def test_a_row_learns_what_there_is_to_learn(rows: Path) -> None:
    final = [row for row in read_rows(rows) if row.phase == "final"]
    assert {row.spec.method for row in final} == {"lora", "none"}
    assert all(row.status == "ok" for row in final)
    lora = [row for row in final if row.spec.method == "lora"]
    assert [row.spec.seed for row in lora] == [1, 2]
    # Guessing is a third.
    assert min(row.figures["test"] for row in lora) > 0.8
    assert lora[0].figures["parameters"] == lora[0].figures["target"]
    assert all("test" not in row.figures for row in read_rows(rows) if row.phase == "sweep")


def test_a_second_run_makes_only_what_is_missing(
    language: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    lines = next(rows.glob("rows*.jsonl")).read_text().splitlines()
    # A kill after five rows, in the middle of the sixth.
    (tmp_path / "rows-toy-0of2.jsonl").write_text("\n".join([*lines[:5], lines[5][:100]]))
    said: list[str] = []
    plan = Plan(str(language[0]), ["letters"], ["lora", "none"], ["medium"], 2, RECIPE)
    made = run(plan, language[1], tmp_path, device=CPU, say=said.append)
    assert made == len(said) == len(lines) - 5
    again = {(r.spec.id, r.phase): r.figures.get("test") for r in read_rows(tmp_path)}
    assert again == {(r.spec.id, r.phase): r.figures.get("test") for r in read_rows(rows)}
    assert run(plan, language[1], tmp_path, device=CPU, seconds=0, say=said.append) == 0


def test_no_row_begins_after_the_time(language: tuple[Path, Path], tmp_path: Path) -> None:
    plan = Plan(str(language[0]), ["letters"], ["lora"], ["medium"], 1, RECIPE)
    assert run(plan, language[1], tmp_path, device=CPU, seconds=-1) == 0
    assert not list(read_rows(tmp_path))


def test_a_row_is_made_again_from_its_id(
    language: tuple[Path, Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = next(row for row in read_rows(rows) if row.phase == "final")
    options = ["--base", str(language[0]), "--tasks", str(language[1]), "--rows", str(rows)]
    assert command.main(["row", wanted.spec.id, *options, "--device", "cpu"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["same"]
    assert line["again"]["test"] == wanted.figures["test"]
    assert command.main(["row", "zz", *options, "--device", "cpu"]) == 2


def test_a_check_runs_every_method_once(
    language: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", str(language[0]), "--tasks", str(language[1]), "--rows", str(tmp_path)]
    short = ["--steps", "2", "--batch-size", "2", "--limit", "2", "--device", "cpu"]
    methods = ["--task", "letters", "--methods", "lora-all", "prodial", "none"]
    assert command.main(["check", *options, *methods, "--budgets", "small", *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:3] for line in lines[:3]]
    assert found == [
        ["lora-all", "small", "unfit"], ["prodial", "small", "ok"], ["none", "own", "ok"]
    ]  # fmt: skip
    # They are no rows of a study.
    assert not list(read_rows(tmp_path))
    assert len((tmp_path / "check.jsonl").read_text().splitlines()) == 3


def test_an_append_ends_what_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "rows-a.jsonl"
    path.write_text('{"id": "half')
    row = Row(Spec("b", "t", "lora", "small", 1e-3, 1), "final", figures={"test": 0.5})
    append(path, row)
    append(path, replace(row, phase="sweep"))
    assert [(r.phase, r.figures) for r in read_rows(tmp_path)] == [
        ("final", {"test": 0.5}),
        ("sweep", {"test": 0.5}),
    ]
    before = list(read_rows(tmp_path))
    (tmp_path / "rows-a.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert list(read_rows(tmp_path)) == before


def test_rows_side_by_side_are_the_same_rows(
    language: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    lines: list[str] = []

    def made(methods: list[str], seconds: float = float("inf")) -> int:
        plan = Plan(str(language[0]), ["letters"], methods, ["medium"], 2, RECIPE)
        return run_stacks(
            plan, language[1], tmp_path, device=CPU, at_once=3, seconds=seconds, say=lines.append
        )

    assert made(["lora", "none"], 0.0) == 0
    assert made(["none"]) == 2
    assert made(["lora", "none"]) == 6
    assert made(["lora", "none"]) == 0
    # Stacks of one and one; of two, two and two.
    assert len(lines) == 2 + 3
    alone = {(row.spec.id, row.phase): row for row in read_rows(rows)}
    together = {(row.spec.id, row.phase): row for row in read_rows(tmp_path)}
    assert together.keys() == alone.keys()
    for key, row in together.items():
        assert row.where["way"] == "side by side"
        for name in ("parameters", "validation", "test"):
            assert row.figures.get(name) == pytest.approx(alone[key].figures.get(name)), key


def test_the_best_rate_is_the_smallest_of_the_best() -> None:
    def row(rate: float, accuracy: float, status: str = "ok") -> Row:
        figures = {"validation": accuracy}
        return Row(Spec("b", "t", "lora", "small", rate, 0), "sweep", status, figures)

    grid = [row(1e-4, 0.1), row(1e-3, 0.5), row(1e-2, 0.5), row(1e-1, 0.2)]
    assert chosen_rate(grid) == (1e-3, False)
    assert chosen_rate(grid[:2]) == (1e-3, True)
    assert chosen_rate([row(1e-3, 0.9, "diverged")]) is None


def test_vision_rows_train_a_new_classifier(tmp_path: Path) -> None:
    card = {"name": "vim", "kind": "vision", "shape": "vim-toy", "outputs": 10}
    save_base(build("vim-toy", 10), tmp_path / "base", card, None)
    bright = np.zeros((40, 1, 32, 32), np.uint8)
    labels = np.arange(40) % 2
    bright[labels == 1] = 255
    task = ImageTask("bright", {"what": "a toy"}, ("dark", "bright"))
    task.splits = dict.fromkeys(("train", "validation", "test"), (bright, labels))
    save_task(task, tmp_path / "tasks")
    plan = Plan(
        str(tmp_path / "base"), ["bright"], ["prodial", "probe"], ["small"], 1,
        Recipe(steps=12, batch_size=8),
    )  # fmt: skip
    run(plan, tmp_path / "tasks", tmp_path / "rows", device=CPU, say=lambda line: None)
    final = {r.spec.method: r.figures for r in read_rows(tmp_path / "rows") if r.phase == "final"}
    assert {name: f["test"] for name, f in final.items()} == {"prodial": 1.0, "probe": 1.0}
    assert final["probe"]["parameters"] == 0
    assert final["probe"]["head"] == final["prodial"]["head"] == 2 * 32 + 2


def test_a_task_of_the_other_kind_is_refused(
    language: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((1, 1, 32, 32), np.uint8), np.zeros(1, np.int64)
    task = ImageTask("dots", {"what": "a toy"}, ("dot",))
    task.splits = dict.fromkeys(("train", "validation", "test"), images)
    save_task(task, tmp_path)
    options = ["--base", str(language[0]), "--tasks", str(tmp_path), "--rows", str(tmp_path)]
    arguments = ["run", *options, "--task", "dots", "--methods", "lora", "--device", "cpu"]
    # The row says what went wrong; others go on.
    with pytest.raises(ValueError, match="dots is vision, the base toy language"):
        raise _error_of(arguments)


def _error_of(arguments: list[str]) -> Exception:
    args = command._parser().parse_args(arguments)
    try:
        args.call(args)
    except ValueError as error:
        return error
    return AssertionError("nothing was refused")
