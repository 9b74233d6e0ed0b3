"""Whole searches on a tiny model: what they try, keep, continue and leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.cli import commands
from prodial_kernels.search import SearchConfig, SearchResult, search, searching
from prodial_kernels.search.directory import SearchError
from prodial_kernels.search.trials import Trials
from prodial_kernels.training import FinetuneConfig, finetune
from prodial_kernels.training.config import ConfigError
from prodial_kernels.training.config_file import read_config_file
from prodial_kernels.upstream import MissingExtraError
from support.tiny_model import subprocess_environment

pytest.importorskip("optuna")
PARTS = ("scale", "diagonal", "lora")
RUN: dict[str, Any] = {
    "steps": 6, "batch_size": 2, "seq_len": 32, "warmup": 1, "lr": 0.01, "device": "cpu"
}  # fmt: skip


def config(place: Path, output: Path, *, run: dict[str, Any] | None = None, **own: Any) -> Any:
    options = {**RUN, "model": str(place / "model"), "data": str(place / "text.txt"), **(run or {})}
    return SearchConfig(
        run=FinetuneConfig(output=str(output), **options), **{"trials": 7, "among": PARTS, **own}
    )


@pytest.fixture(scope="module")
def found(place: Path) -> SearchResult:
    return search(config(place, place / "search"), progress=False)


@pytest.fixture(autouse=True)
def _only_that_search_is_drawn(found: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "plot_search", lambda result, path: path.touch())


def tried(result: SearchResult) -> list[tuple[Any, ...]]:
    """What was tried, and what came out: first what was tried first anyway, in any order."""
    found = [(r.step, r.on, dict(r.values), r.state, r.value, r.trainable) for r in result.records]
    return [*sorted(found[:4], key=lambda each: each[1]), *found[4:]]


def test_every_part_is_tried_by_itself_then_combinations_then_sizes(found: SearchResult) -> None:
    records = found.records
    assert [r.on for r in records[:4]] == [("scale",), ("diagonal",), ("lora",), PARTS]
    assert [r.number for r in records] == list(range(1, 8))
    steps = [r.step for r in records]
    assert steps == sorted(steps)
    first = [r.on for r in records if r.step == "methods"]
    assert len(set(first)) == len(first) == 5
    second = [r for r in records if r.step == "sizes"]
    assert all(r.values["lr"] != 0.01 for r in second)
    best = sorted(r.value for r in records[:5] if r.state == "done")[:3]
    assert {r.on for r in second} <= {r.on for r in records[:5] if r.value in best}
    assert all(r.trainable > 0 and r.steps in (2, 4, 6) for r in records)


def test_what_it_leaves_behind(found: SearchResult) -> None:
    names = {path.name for path in found.output.iterdir()}
    assert names == {
        "search.json", "trials.sqlite", "report.md", "results.json", "search.png", "best.json",
        "workers",
    }  # fmt: skip
    assert (found.output / "search.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((found.output / "results.json").read_text())
    assert results["best"]["value"] == min(r["value"] for r in results["records"])
    assert results["before"] == found.before
    report = (found.output / "report.md").read_text()
    assert found.best is not None
    assert f"{found.best.value:.4f}" in report
    assert str(found) in report
    assert "best combination" in str(found)


def test_fine_tuning_with_the_best_gives_what_the_search_saw(
    found: SearchResult, tmp_path: Path
) -> None:
    """The model is the pretrained one in every trial, whatever was trained in it before."""
    assert found.best is not None
    options = read_config_file(found.best_file)
    assert "steps" not in options
    run = finetune(FinetuneConfig(**options, output=str(tmp_path / "run"), steps=6), progress=False)
    assert run.after["bits_per_byte"] == found.best.value
    assert run.trainable == found.best.trainable
    assert run.before["bits_per_byte"] == found.before["bits_per_byte"]


def test_an_interrupted_search_continues_as_if_it_had_not_been(
    place: Path, tmp_path: Path, found: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream, calls = Trials.run, []

    def interrupted(self: Trials, *args: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return upstream(self, *args)

    monkeypatch.setattr(Trials, "run", interrupted)
    again = config(place, tmp_path / "search")
    with pytest.raises(KeyboardInterrupt):
        search(again, progress=False)
    with pytest.raises(KeyboardInterrupt):
        search(again, resume=True, progress=False)
    assert tried(search(again, resume=True, progress=False)) == tried(found)
    assert len(calls) == 9
    # A finished one has nothing left to do; it can be made longer.
    assert tried(search(again, resume=True, progress=False)) == tried(found)
    longer = search(config(place, tmp_path / "search", trials=8), resume=True, progress=False)
    assert tried(longer)[:7] == tried(found)
    assert len(longer.records) == 8
    assert len(calls) == 10


def test_a_trial_that_fails_is_recorded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = Trials.run

    def failing(self: Trials, run: FinetuneConfig, ends: Any) -> Any:
        if run.train_diagonal:
            raise RuntimeError("no diagonal today")
        return upstream(self, run, ends)

    monkeypatch.setattr(Trials, "run", failing)
    result = search(config(place, tmp_path / "search", trials=6), progress=False)
    states = {r.on: (r.state, r.error) for r in result.records}
    assert states["diagonal",] == ("failed", "RuntimeError: no diagonal today")
    assert all((r.state == "failed") is ("diagonal" in r.on) for r in result.records)
    assert result.best is not None
    assert "failed" in str(result)
    assert "no diagonal today" in (tmp_path / "search" / "report.md").read_text()


def test_a_search_in_which_all_fails_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(Trials, "run", failing)
    expected = "all 3 trials failed; the first, scale: RuntimeError: nothing works"
    with pytest.raises(SearchError, match=expected):
        search(config(place, tmp_path / "search"), progress=False)


def test_a_model_that_a_trial_changed_is_loaded_anew(
    place: Path, tmp_path: Path, found: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = Trials.run

    def spoiling(self: Trials, run: FinetuneConfig, ends: Any) -> Any:
        def spoil(step: int, metrics: Any) -> bool:
            next(self._loaded.model.parameters()).data.add_(1.0)
            return False

        return upstream(self, run, spoil if run.r == 0 else ends)

    monkeypatch.setattr(Trials, "run", spoiling)
    result = search(config(place, tmp_path / "search", trials=4), progress=False)
    assert result.records[2].on == ("lora",)
    assert result.records[2].value == found.records[2].value


def test_a_limit_of_trained_parameters(place: Path, tmp_path: Path, found: SearchResult) -> None:
    sizes = {r.on: r.trainable for r in found.records if r.step == "methods"}
    result = search(config(place, tmp_path / "search", max_trainable=3000), progress=False)
    assert all(r.trainable <= 3000 for r in result.records)
    # At its usual rank LoRA alone is too large, and so are larger ones than 4.
    assert sizes["lora",] == 8960
    assert next(r for r in result.records if r.on == ("lora",)).values["lora.r"] == 4
    assert all(r.values.get("lora.r", 2) <= 4 for r in result.records)
    assert any(len(r.on) > 1 for r in result.records)
    with pytest.raises(ConfigError, match=r"lora: it trains at least 1,120 .*max_trainable=1,000"):
        search(config(place, tmp_path / "other", max_trainable=1000), progress=False)
    assert not (tmp_path / "other").exists()


def test_methods_beside_the_adapter(place: Path, tmp_path: Path) -> None:
    among = ("scale", "rows-X", "D", "lora-x_proj", "dt_bias", "bitfit")
    with pytest.raises(ConfigError, match="among lora-x_proj: "):
        search(config(place, tmp_path / "search", among=among), progress=False)
    among = tuple(name for name in among if name != "lora-x_proj")
    result = search(
        config(place, tmp_path / "search", among=among, run={"target_modules": ("in_proj",)}),
        progress=False,
    )
    records = {r.on: r for r in result.records if r.step == "methods"}
    assert {(name,) for name in among} <= records.keys()
    assert records["rows-X",].options["methods"][0]["rows"] == ["X"]
    # Both train the biases of the step size, so they are not combined.
    assert not any({"dt_bias", "bitfit"} <= set(r.on) for r in result.records)
    assert all(r.state != "failed" for r in result.records)
    for record in result.records:
        methods = record.options.get("methods", [])
        adapters = [m for m in methods if m["name"] == "prodial"]
        assert len(adapters) == (("scale" in record.on) and bool(methods))
        assert all(m["target_modules"] == ("in_proj",) for m in map(_tuples, adapters))
    options = read_config_file(result.best_file)
    run = finetune(FinetuneConfig(**options, output=str(tmp_path / "run"), steps=6), progress=False)
    assert result.best is not None
    assert run.after["bits_per_byte"] == result.best.value


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def test_what_cannot_be_searched_is_refused(place: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"among": ("scale", "lorra")}, "among must be one of .* got 'lorra'; did you mean 'lora'"),
        ({"among": ("scale",)}, "at least two parts"),
        ({"trials": 3}, r"trials 3 are not enough: each of 3 parts .*scale, diagonal, lora"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"run": {"r": 8}}, "r: a search chooses methods and their sizes itself"),
        ({"run": {"save_every": 3}}, "save_every would have no effect"),
        ({"run": {"quantize": "auto"}}, "name a format, such as 'nf4'"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(config(place, tmp_path / "new", **wrong), progress=False)
    assert not (tmp_path / "new").exists()


def test_whose_directory_it_is(place: Path, tmp_path: Path, found: SearchResult) -> None:
    with pytest.raises(SearchError, match="already holds a search: continue it with resume=True"):
        search(config(place, found.output), progress=False)
    with pytest.raises(SearchError, match=r"these differ: lr \(search: 0.01, now: 0.02\)"):
        search(config(place, found.output, run={"lr": 0.02}), resume=True, progress=False)
    with pytest.raises(SearchError, match="no search to resume"):
        search(config(place, tmp_path / "none"), resume=True, progress=False)
    (tmp_path / "file").write_text("something")
    with pytest.raises(SearchError, match="not an empty directory"):
        search(config(place, tmp_path), progress=False)


def test_the_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: SearchResult
) -> None:
    assert commands.main(["search", "--resume", "--output", str(found.output)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{found}\n"
    assert commands.main(["search", "--output", str(found.output)]) == 1
    assert "continue it with --resume, or choose another" in capsys.readouterr().err
    assert commands.main(["search", "--output", str(tmp_path / "x"), "--among", "lorra"]) == 1
    assert "--among must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.main(["search", "--rank", "8"])
    assert "'prodial search' has none of that name" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        MissingExtraError, match=r'optuna, .*pip install "prodial-kernels\[search\]'
    ):
        search(config(place, tmp_path / "search"), progress=False)
    assert not (tmp_path / "search").exists()


def test_multiple_choice_is_searched_by_its_error(place: Path, tmp_path: Path) -> None:
    rows = [{"context": f"{n} is ", "choices": ["even", "odd"], "label": n % 2} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    result = search(
        config(place, tmp_path / "search", trials=4, run={"data": str(data)}), progress=False
    )
    assert result.objective == "error"
    for record in result.records:
        assert record.value is not None
        assert math.isclose(record.value, 1 - record.metrics["acc"])


def test_several_processes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in subprocess_environment().items():
        monkeypatch.setenv(name, value)
    among = ("scale", "lora")
    result = search(
        config(place, tmp_path / "search", among=among, trials=8, workers=2), progress=False
    )
    assert len(result.records) == 8
    workers = tmp_path / "search" / "workers"
    assert {path.name for path in workers.iterdir()} == {"0", "1", "log-1.txt"}
    log = (workers / "log-1.txt").read_text()
    # It prints the search's result as well, and had a place of its own.
    assert f"best combination  {result.best_combination.value:.4f}" in log  # type: ignore[union-attr]
    assert "error" not in log
