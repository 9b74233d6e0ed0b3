"""Hub data sets, by a stand-in for the ``datasets`` library."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from prodial_kernels.training.data.examples import DataError, MultipleChoice
from prodial_kernels.training.data.splits import load_documents, read_whole


def install(monkeypatch: pytest.MonkeyPatch, splits: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    module = ModuleType("datasets")

    def load_dataset(*arguments: Any) -> Any:
        calls.append(arguments)
        if isinstance(splits, Exception):
            raise splits
        return splits

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def texts(name: str, n: int) -> list[dict[str, str]]:
    return [{"text": f"{name} {i}"} for i in range(n)]


def test_own_splits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"test": texts("test", 2), "train": texts("train", 6), "validation": texts("val", 3)}
    calls = install(monkeypatch, splits)
    split = load_documents("someone/corpus:small")
    assert calls == [("someone/corpus", "small")]
    assert set(split.train) == {f"train {i}" for i in range(6)}
    assert set(split.held_out) == {f"val {i}" for i in range(3)}
    assert set(read_whole("someone/corpus:small").examples) == set(split.held_out)
    assert "of the splits test, train, validation: train to train on, validation held out" in (
        split.notes
    )


def test_a_single_split_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, {"train": texts("train", 40)})
    split = load_documents("corpus", held_out_fraction=0.3)
    assert calls == [("corpus", None)]
    assert len(split.train) + len(split.held_out) == 40
    assert split.held_out


def test_unlabelled_rows_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"ctx": "a", "endings": ["b", "c"], "label": "0"}
    install(monkeypatch, {"train": [row], "test": [row, row | {"label": ""}]})
    with pytest.raises(DataError, match=r"^swag\[test\] row 1: 'label' is empty"):
        load_documents("swag")
    install(monkeypatch, {"train": [row], "validation": [row]})
    assert isinstance(load_documents("swag").train[0], MultipleChoice)


def test_failures_keep_their_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ConnectionError("no route"))
    with pytest.raises(DataError, match=r"'corpus' could not be loaded: ConnectionError: no route"):
        load_documents("corpus")
    install(monkeypatch, {})
    with pytest.raises(DataError, match="has no splits"):
        load_documents("corpus")


def test_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no file or directory here.*pip install datasets"):
        load_documents("someone/corpus")
