"""A model's name: a directory, a hub id, or a path to nothing, which fails without a network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prodial_kernels.models.loading import source
from prodial_kernels.models.loading.source import ModelError, without_retries
from support.tiny_model import write_tiny_model

find = source.model_source


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "my-model")
    (tmp_path / "my-run" / "adapter").mkdir(parents=True)
    (tmp_path / "my-run" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["state-spaces/mamba-130m-hf", "gpt2", "my-organisation/model-7b", "note", "mamba_2.1/x"],
)
def test_hub_ids(name: str) -> None:
    assert find(name) == name


@pytest.mark.parametrize(
    "name",
    ["my-run/model", "nowhere/adapter", "nowhere/merged", "nowhere/checkpoint-60", "./my-mo",
     "/no/such/place", "~/no-such-place", "a/b/c", "has spaces", "notes/model", "a:b"],
)  # fmt: skip
def test_paths_to_nothing(name: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        find(name)


@pytest.mark.parametrize(
    ("name", "meant"), [("my-modle", "my-model"), ("my-rnu/adapter", "my-run/adapter")]
)
def test_misspelt_paths(name: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"did you mean {meant}"):
        find(name)


def test_directories_that_are_no_model(here: Path) -> None:
    with pytest.raises(ModelError, match="holds an adapter, not a model"):
        find("my-run/adapter")
    with pytest.raises(ModelError, match=r"there is no config\.json"):
        find("notes")
    write_tiny_model(here / "my-run" / "merged")
    with pytest.raises(ModelError, match=r"no config\.json in it; did you mean '.*my-run/merged'"):
        find("my-run")
    file = here / "notes" / "config.json"
    for text in ("{", "[1]", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ModelError, match=r"config\.json (is not|must hold a) JSON"):
            find("notes")
    with pytest.raises(ModelError, match="is a file"):
        find("notes/config.json")


def test_without_a_network_the_hub_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with without_retries("an/id") as options:
        assert options == {"trust_remote_code": False, "local_files_only": True}
    with without_retries(Path("notes")) as options:
        assert options == {"trust_remote_code": False}
