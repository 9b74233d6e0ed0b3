"""Where ``merge`` may write: never over anything that a merge did not write, checked first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.files.written import MARKER, PlaceError
from prodial_kernels.training import adapted
from prodial_kernels.training.adapted import merge_to_directory
from prodial_kernels.training.merging import MergeError
from support.tiny_run import run


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A finished run."""
    return run(place, place / "run", steps=2, eval_tokens=64).output


def merge(finished: Path, output: Path | str, **options: Any) -> None:
    merge_to_directory(None, finished / "adapter", output, device="cpu", replace=True, **options)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("data", "holds rows.jsonl, and is no model that 'prodial' wrote"),
        ("model", "is the base model"),
        ("model/merged", "lies in the base model"),
        ("run", "holds the adapter"),
        ("run/adapter", "is the adapter"),
        ("run/adapter/merged", "lies in the adapter"),
        ("run/state", "belongs to the run"),
        ("run/merged", "belongs to the run"),
        ("run/model", "belongs to the run"),
        ("run/merged/more", "belongs to the run"),
        (".", "holds the adapter"),
        ("..", "holds the adapter"),
        ("work", "is the working directory"),
        ("text.txt", "text.txt is not a directory"),
        ("linked", "holds rows.jsonl"),
        ("run/../data", "holds rows.jsonl"),
        ("/", "holds the adapter"),
        ("work/.", "is the working directory"),
    ],
)
def test_what_is_not_its_own_stays(
    place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    for name in ("data", "work"):
        (place / name).mkdir(exist_ok=True)
    (place / "data" / "rows.jsonl").write_text("{}")
    if not (place / "linked").exists():
        (place / "linked").symlink_to("data")
    monkeypatch.chdir(place / "work")
    monkeypatch.setattr(adapted, "load_model", unwanted)
    before = _tree(place)
    with pytest.raises(PlaceError, match=message):
        merge(finished, place / output)
    assert _tree(place) == before


def test_the_base_of_a_second_merge_stays(place: Path, finished: Path, tmp_path: Path) -> None:
    merge(finished, tmp_path / "base")
    before = _tree(tmp_path)
    adapter = finished / "adapter"
    with pytest.raises(PlaceError, match="is the base model"):
        merge_to_directory(str(tmp_path / "base"), adapter, tmp_path / "base", replace=True)
    assert _tree(tmp_path) == before


def test_replaces_a_merge_through_a_link(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "merged").symlink_to("elsewhere")
    for _ in range(2):
        merge(finished, tmp_path / "merged")
    assert (tmp_path / "merged").is_symlink()
    assert (tmp_path / "elsewhere" / MARKER).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "merged"]


def test_beside_a_run_and_in_a_free_place_of_it(finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "run")
    merge(output, output / "merged-again")
    with pytest.raises(PlaceError, match="belongs to the run"):
        merge(output, output / "merged-again")


def test_a_refused_merge_leaves_the_good_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(finished, tmp_path / "merged")
    before = _tree(tmp_path)

    def wrong(*_: Any) -> torch.Tensor:
        return torch.full((4, 64, 264), torch.nan)

    monkeypatch.setattr(adapted, "logits_of", wrong)
    for output in ("merged", "new"):
        with pytest.raises(MergeError, match=r"does not compute what was trained.*not kept"):
            merge(finished, tmp_path / output)
    assert _tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_others_may_read_the_merged_model(finished: Path, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        merge(finished, tmp_path / "merged")
    finally:
        os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "merged").iterdir()} == {0o644}


def test_where_nothing_may_be_written_is_seen_before_the_model_is_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted, "load_adapted", lambda *_, **__: pytest.fail("was loaded"))
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match="Permission denied") as caught:
        merge(finished, tmp_path / "not" / "there")
    assert caught.value.filename == str(tmp_path)
