"""Who may start a run where: the lock first, then a second look, and no trace of a failed start."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.training import finetuning
from prodial_kernels.training.config import OPTIONS
from prodial_kernels.training.run.directory import RunDirectory, RunError
from prodial_kernels.training.run.loop import NonFiniteLossError
from prodial_kernels.training.run.metrics import read_metrics
from prodial_kernels.training.run.state import StateError
from prodial_kernels.training.start import given
from support.tiny_run import run

_SHORT = {"steps": 3, "eval_tokens": 64, "save_every": 1, "eval_every": 0}


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A finished run."""
    return run(place, place / "finished", **_SHORT).output


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same, as if it had been killed after its last save."""
    folder = shutil.copytree(finished, tmp_path / "unfinished")
    (folder / "results.json").unlink()
    return folder


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "run.json").read_text())["config"]
    return config


def test_a_second_start_is_refused_while_the_first_one_loads(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, refused = finetuning.prepare, []

    def prepare_slowly(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(finetuning, "prepare", prepare)
        made = prepare(*args, **options)
        for resume in (False, True):
            with pytest.raises(RunError, match=r"another process is running|no run to resume"):
                run(place, tmp_path / "run", lr=0.05, resume=resume, **_SHORT)
            refused.append(resume)
        return made

    monkeypatch.setattr(finetuning, "prepare", prepare_slowly)
    run(place, tmp_path / "run", **_SHORT)
    assert refused == [False, True]
    assert _config(tmp_path / "run")["lr"] == 0.01


def test_who_was_overtaken_does_not_train_over_a_finished_run(
    place: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = RunDirectory.check_startable

    def overtaken(self: RunDirectory) -> None:
        check(self)
        monkeypatch.setattr(RunDirectory, "check_startable", check)
        shutil.copytree(finished, self.path)

    monkeypatch.setattr(RunDirectory, "check_startable", overtaken)
    with pytest.raises(RunError, match="already holds a run"):
        run(place, tmp_path / "run", lr=0.05, **_SHORT)
    assert _config(tmp_path / "run") == _config(finished)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "liger"}, "liger' cannot be used: it needs a CUDA device"),
        ({"cuda_graph": "on"}, "cuda_graph 'on' cannot be"),
        ({"optimizer": "adamw8bit"}, "needs a CUDA device"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"n_blocks": {"in_porj": 4}}, "n_blocks"),
        ({"n_blocks": 7}, "must divide"),
        ({"target_modules": ["q"]}, "matches nothing"),
        ({"r": 0, "train_scale": False, "train_diagonal": False}, "nothing would be trained"),
        ({"memory_budget": "8GB"}, "cannot be kept"),
        ({"data": "./none"}, "no such file"),
        ({"method": "lora", "n_blocks": 7}, "must divide"),
    ],
    ids=str,
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(given, "load_model", unwanted)
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(place, tmp_path / "deep" / "run", **options)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_was_there_stays(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        run(place, tmp_path, target_modules=["q"])
    assert tmp_path.is_dir()


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "load_model", None)
    with pytest.raises(NotADirectoryError):
        run(place, place / "text.txt" / "run")

    def forbidden(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # Nothing is forbidden to root, as tests may be run.
    monkeypatch.setattr(RunDirectory, "_check_writable", forbidden)
    with pytest.raises(PermissionError):
        run(place, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_saved_nothing_makes_room(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Such a rate is refused at once otherwise.
    monkeypatch.setitem(OPTIONS, "lr", replace(OPTIONS["lr"], range=(0, 1e40)))
    output = tmp_path / "run"
    with pytest.raises(NonFiniteLossError):
        run(place, output, lr=1e30, clip=0.0, eval_tokens=64, save_every=0)
    assert (output / "run.json").exists()
    (output / "notes.txt").write_text("mine")
    result = run(place, output, progress=True, **_SHORT)
    assert "an earlier run" in capsys.readouterr().err
    assert result.steps == 3
    assert _config(output)["lr"] == 0.01
    steps = [r["step"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 2, 3]
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kept", ["state", "results.json", "adapter", "merged"])
def test_a_run_that_saved_anything_stays(
    place: Path, tmp_path: Path, finished: Path, kept: str
) -> None:
    output = shutil.copytree(finished, tmp_path / "run")
    for name in {"state", "results.json", "adapter", "merged"} - {kept}:
        path = output / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(RunError, match="already holds a run"):
        run(place, output, **_SHORT)


@pytest.mark.parametrize("name", [".run.json.partial", ".metrics.jsonl.partial"])
def test_a_start_that_was_killed_while_it_wrote_makes_room(
    place: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("{")
    run(place, tmp_path, **_SHORT)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("text", ["{", '{"steps": 3}', "[]"])
def test_another_programs_run_json_stays(place: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        run(place, tmp_path, **_SHORT)
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "[" * 100_000, "{}", '{"format_version": 2}', '{"format_version": 1}',
        '{"format_version": 1, "config": [], "model": "", "data": "", "held_out": "", '
        '"device": ""}',
        '{"format_version": 1, "config": {}, "model": 1, "data": "", "held_out": "", '
        '"device": ""}',
        "\x00",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_malformed_description_is_a_run_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        RunDirectory(tmp_path).read_identity()


def test_a_description_that_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(RunError, match="no run to resume"):
        RunDirectory(tmp_path).read_identity()


def test_states_belong_to_their_run(place: Path, tmp_path: Path, unfinished: Path) -> None:
    """Its options were edited, or its states come from a run with others."""
    text = (unfinished / "run.json").read_text()
    (unfinished / "run.json").write_text(text.replace('"lr": 0.01', '"lr": 0.02'))
    with pytest.raises(StateError, match=r"all 2 saved states are damaged.*of another run"):
        run(place, unfinished, resume=True, **{**_SHORT, "lr": 0.02})
    (unfinished / "run.json").write_text(text)
    other = run(place, tmp_path / "other", **{**_SHORT, "lr": 0.02}).output
    shutil.rmtree(unfinished / "state")
    shutil.copytree(other / "state", unfinished / "state")
    with pytest.raises(StateError, match="of another run"):
        run(place, unfinished, resume=True, **_SHORT)


def test_without_a_whole_state_it_stops_until_told_to_begin_again(
    place: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_metrics(unfinished / "metrics.jsonl")
    for state in (unfinished / "state").iterdir():
        (state / "tensors.safetensors").write_bytes(b"x")
    with pytest.raises(StateError, match=r"all 2 saved states are damaged.*remove .*state to"):
        run(place, unfinished, resume=True, **_SHORT)
    assert read_metrics(unfinished / "metrics.jsonl") == before
    shutil.rmtree(unfinished / "state")
    assert run(place, unfinished, resume=True, progress=True, **_SHORT).steps == 3
    assert "no saved state yet: starting from step 0" in capsys.readouterr().err


def _when_logged(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    logged = finetuning.RunEvents.logged

    def acting(self: Any, record: Any) -> None:
        logged(self, record)
        if record.position.step == step:
            action()

    monkeypatch.setattr(finetuning.RunEvents, "logged", acting)


@pytest.mark.parametrize("how", ["removed", "replaced", "removed at the end"])
def test_a_directory_that_goes_away_during_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    output = tmp_path / "run"

    def go() -> None:
        shutil.rmtree(output)
        if how == "replaced":
            output.mkdir()

    _when_logged(monkeypatch, 3 if how == "removed at the end" else 2, go)
    with pytest.raises(RunError, match="was removed, moved or replaced while the run"):
        run(place, output, **{**_SHORT, "save_every": 0})
    assert not list(tmp_path.rglob("*")) or how == "replaced"


def test_metrics_that_go_away_during_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    _when_logged(monkeypatch, 2, (output / "metrics.jsonl").unlink)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        run(place, output, **_SHORT)
    monkeypatch.undo()
    assert run(place, output, resume=True, **_SHORT).after


def test_says_what_other_versions_it_goes_on_with(
    place: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from prodial_kernels.training.run import state

    monkeypatch.setattr(state, "surroundings", lambda: {"torch": "9.9", "threads": "1"})
    run(place, unfinished, resume=True, progress=True, **_SHORT)
    (line,) = [
        text for text in capsys.readouterr().err.splitlines() if "the last bits may differ" in text
    ]
    assert "torch 9.9 (was " in line


def test_runs_where_there_is_no_lock_of_the_system(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, which also keeps no count of a process's memory and flushes no directory."""
    for module in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run(place, tmp_path / "run", **_SHORT)
    assert result.peak_bytes == 0
    assert not list((tmp_path / "run").rglob(".lock"))
    with (
        RunDirectory(tmp_path / "run").only_one_process(),
        pytest.raises(RunError, match=r"another process is running.*remove .*\.lock"),
    ):
        run(place, tmp_path / "run", resume=True, **_SHORT)
