"""A directory is replaced only where it is ours, whole or not at all, and whatever else happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.files import atomic
from prodial_kernels.files.atomic import atomic_directory, beside
from prodial_kernels.files.written import (
    MARKER,
    PlaceError,
    check_place,
    clear_leftovers,
    mark_written,
    own_files,
)


def write(path: Path, content: str, *, replace: bool = True, stop: bool = False) -> None:
    """Write a marked directory as the command line does a model."""
    clear_leftovers(path)
    with atomic_directory(path, own_files=own_files if replace else None) as folder:
        (folder / "sub").mkdir()
        for name in ("config.json", "sub/weights"):
            (folder / name).write_text(content)
        mark_written(folder)
        if stop:
            raise RuntimeError("stop")


def content(path: Path) -> str:
    """What a whole directory was written with."""
    (found,) = {(path / name).read_text() for name in ("config.json", "sub/weights")}
    return found


def test_replaces_an_empty_directory_and_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for text in ("old", "newer", "new"):
        write(tmp_path / "model", text)
        assert content(tmp_path / "model") == text
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(FileExistsError):
        write(tmp_path / "model", "newest", replace=False)
    assert content(tmp_path / "model") == "new"


def test_what_fails_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "model", "new", stop=True)
    assert content(tmp_path / "model") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def _add(path: Path) -> None:
    (path / "thesis.tex").write_text("mine")


def _add_below(path: Path) -> None:
    (path / "sub" / "notes.txt").write_text("mine")


def _add_folder(path: Path) -> None:
    (path / "sub" / "mine").mkdir()


def _train_on(path: Path) -> None:
    (path / "config.json").write_text("mine")


def _same_size(path: Path) -> None:
    (path / "config.json").write_text("odl")


def _link(path: Path) -> None:
    (path / "config.json").rename(path.with_name("config.json"))
    (path / "config.json").symlink_to(path.with_name("config.json"))


def _lose_marker(path: Path) -> None:
    (path / MARKER).unlink()


def _damage_marker(path: Path) -> None:
    (path / MARKER).write_text("[" * 100_000)


def _hostile_marker(path: Path) -> None:
    path.with_name("precious").write_text("old")
    values = json.loads((path / MARKER).read_text())
    values["files"]["../precious"] = values["files"]["config.json"]
    (path / MARKER).write_text(json.dumps(values))


def _only_a_marker(path: Path) -> None:
    for name in ("config.json", "sub/weights"):
        (path / name).unlink()
    values = {"format_version": 1, "files": {"config.json": None}}
    (path / MARKER).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_add, "thesis.tex in it was not"),
        (_add_below, "sub/notes.txt in it was not"),
        (_add_folder, "sub/mine in it was not"),
        (_train_on, "config.json .* was changed since"),
        (_same_size, "config.json .* was changed since"),
        (_link, "config.json .* was changed since"),
        (_lose_marker, "holds config.json, sub/weights, and is no model"),
        (_damage_marker, "is no model"),
        (_hostile_marker, "is no model"),
        (_only_a_marker, "is no model"),
    ],
)  # fmt: skip
def test_leaves_alone_and_names_what_is_not_its_own(
    tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    write(tmp_path / "model", "old")
    change(tmp_path / "model")
    before = _tree(tmp_path)
    with pytest.raises(PlaceError, match=named):
        write(tmp_path / "model", "new")
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "fifo", "data"])
def test_leaves_alone_what_is_no_directory_of_its_own(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    if kind == "file":
        path.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "data":
        path = tmp_path / "data"
    else:
        path.symlink_to(tmp_path / ("data" if kind == "link" else "nothing"))
    before = _tree(tmp_path)
    with pytest.raises(PlaceError, match="not a directory" if kind != "data" else "rows.jsonl"):
        write(path, "new")
    assert _tree(tmp_path) == before


def _tree(folder: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(folder)): p.readlink() if p.is_symlink()
        else p.read_bytes() if p.is_file() else p.is_dir()
        for p in folder.rglob("*")
    }  # fmt: skip


def test_what_others_put_in_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", "old")
    rename = os.rename

    def slow(old: Any, new: Any) -> None:
        if Path(old) == tmp_path / "model":
            _add(Path(old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", slow)
    write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == "new"
    assert [p.read_text() for p in tmp_path.rglob("thesis.tex")] == ["mine"]


def test_two_at_once_both_write_and_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes at every moment between our looks and renames."""
    rename = os.rename
    for moment in (1, 2):
        path = tmp_path / str(moment) / "model"
        write(path, "old")
        calls: list[Any] = []

        def interleaved(
            old: Any, new: Any, path: Path = path, moment: int = moment, calls: list[Any] = calls
        ) -> None:
            calls.append(old)
            if len(calls) == moment:
                monkeypatch.setattr(os, "rename", rename)
                write(path, "theirs")
                monkeypatch.setattr(os, "rename", interleaved)
            rename(old, new)

        monkeypatch.setattr(os, "rename", interleaved)
        write(path, "ours")
        monkeypatch.setattr(os, "rename", rename)
        assert len(calls) == 2 * moment
        assert content(path) == "ours"
        assert [p.name for p in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write(tmp_path / "model", "old")
    rename, calls = os.rename, []

    def fail(old: Any, new: Any) -> None:
        calls.append(old)
        if len(calls) == failing:
            raise OSError(errno.EIO, "broken")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        write(tmp_path / "model", "new")
    assert content(tmp_path / "model") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def _as_of_the_dead(name: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)
        return beside(name, kind)


def test_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    write(path, "old")
    previous = _as_of_the_dead(path, monkeypatch, "previous")
    path.rename(previous)
    shutil.copytree(previous, _as_of_the_dead(path, monkeypatch, "partial"))
    with pytest.raises(RuntimeError, match="stop"):
        write(path, "new", stop=True)
    assert content(path) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    shutil.copytree(path, _as_of_the_dead(path, monkeypatch, "previous"))
    write(path, "new")
    assert content(path) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_leftovers_that_may_be_anothers_stay(tmp_path: Path) -> None:
    """By name, or because who writes it still lives."""
    theirs = (".model.previous", ".model.partial", beside(tmp_path / "model", "partial").name)
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    write(tmp_path / "model", "old")
    write(tmp_path / "model", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*theirs, "model"))


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "model") as folder:
            (folder / "weights").touch(mode=0o600)
        assert (tmp_path / "model/weights").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
        atomic.atomic_text(tmp_path / "text", "x")
        assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_a_text_replaces_a_link_and_does_not_follow_it(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "text").symlink_to(tmp_path / "precious")
    atomic.atomic_text(tmp_path / "text", "ours")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "text").read_text() == "ours"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a/adapter", "is the adapter"),
        ("a", "holds the adapter"),
        ("a/adapter/merged", "lies in the adapter"),
        ("work", "is the working directory"),
        (".", "holds the adapter"),
        ("work/merged", None),
        ("a/merged", None),
        ("linked/adapter", "is the adapter"),
    ],
)
def test_places(tmp_path: Path, path: str, message: str | None) -> None:
    for name in ("a/adapter", "work"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "linked").symlink_to("a")
    apart, around = tmp_path / "a/adapter", tmp_path / "work"

    def check() -> None:
        check_place(
            tmp_path / path, {"the adapter": apart}, around={"the working directory": around}
        )

    if message is None:
        check()
        return
    with pytest.raises(PlaceError, match=message):
        check()
