"""The model card beside an adapter, and adapters on the hub, which a stand-in is here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from prodial_kernels import ProdialConfig, add_adapter, apply_prodial, load_adapter, save_adapter
from prodial_kernels.checkpoint import AdapterError, fetch_adapter, push_adapter
from prodial_kernels.checkpoint.card import CARD_FILE
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE
from support.saved_adapters import CONFIG, Model, trained

PLAIN = ProdialConfig(r=4, n_blocks=4)


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    save_adapter(trained(PLAIN), tmp_path, base_model="state-spaces/mamba-130m-hf")
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.base_model == "state-spaces/mamba-130m-hf"
    assert card.data.library_name == "prodial-kernels"
    assert set(card.data.tags) == {
        "prodial", "adapter", "base_model:adapter:state-spaces/mamba-130m-hf",
    }  # fmt: skip
    for text in ("| rank | 4 |", "load_adapter(model, DIRECTORY)"):
        assert text in card.text
    assert "from_pretrained('state-spaces/mamba-130m-hf')" in card.text


@pytest.mark.parametrize("name", [None, "/home/me/model", "./model/x", "embedded", "../a"])
def test_a_base_that_is_not_on_the_hub_is_not_claimed_to_be(
    name: str | None, tmp_path: Path
) -> None:
    save_adapter(trained(PLAIN), tmp_path, base_model=name)
    data = ModelCard.load(tmp_path / CARD_FILE).data
    assert data.base_model is None
    assert set(data.tags) == {"prodial", "adapter"}


def test_what_peft_cannot_hold_is_not_said_to_be_in_it(tmp_path: Path) -> None:
    save_adapter(trained(CONFIG), tmp_path)
    assert "PEFT" not in (tmp_path / CARD_FILE).read_text()
    assert "| trained beside | head |" in (tmp_path / CARD_FILE).read_text()
    assert "peft_type" not in json.loads((tmp_path / CONFIG_FILE).read_text())


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    model = trained(PLAIN)
    save_adapter(model, tmp_path)
    first = (tmp_path / CARD_FILE).read_text()
    save_adapter(model, tmp_path, base_model="a/b")
    assert (tmp_path / CARD_FILE).read_text() != first
    for mine in (b"# Mine\n", b"\xff\xfe"):
        (tmp_path / CARD_FILE).write_bytes(mine)
        save_adapter(model, tmp_path)
        assert (tmp_path / CARD_FILE).read_bytes() == mine


# --- The hub. -----------------------------------------------------------------------------------


class Hub:
    """Keeps repositories in folders, and what it was called with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []

    def __call__(self, token: Any = None) -> Hub:
        self.calls.append({"token": token})
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(options)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], **options: Any
    ) -> str:
        self.calls.append(options)
        for name in allow_patterns:
            (self.root / repo_id).mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, self.root / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, *, revision: Any, allow_patterns: list[str]) -> str:
        self.calls.append({"revision": revision, "allow_patterns": allow_patterns})
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    return stand_in


def test_an_adapter_goes_to_the_hub_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    model = trained(PLAIN).eval()
    address = push_adapter(
        model, "adapter", base_model="a/b", private=True, token="t", revision="new",
        commit_message="First", create_pr=True,
    )  # fmt: skip
    assert address == "https://hub/me/adapter/commit/1"
    assert hub.calls == [
        {"token": "t"},
        {"private": True, "exist_ok": True},
        {"revision": "new", "commit_message": "First", "create_pr": True},
    ]
    folder = tmp_path / "me" / "adapter"
    assert {p.name for p in folder.iterdir()} == {CARD_FILE, CONFIG_FILE, TENSOR_FILE}
    plain = Model().eval()
    load_adapter(plain, fetch_adapter("me/adapter", revision="new"))
    x = torch.randn(5, 12)
    assert torch.equal(plain(x), model(x))
    assert hub.calls[-1]["revision"] == "new"


def test_one_of_several_goes_by_its_name(hub: Hub) -> None:
    model = Model()
    apply_prodial(model, PLAIN, "first")
    second = ProdialConfig(r=2, target_modules=["in_proj"])
    add_adapter(model, "second", second)
    push_adapter(model, "me/second", adapter="second")
    plain = Model()
    load_adapter(plain, fetch_adapter("me/second"))
    assert plain.layers[0].in_proj.r == 2


def test_nothing_is_sent_of_what_cannot_be_saved(hub: Hub) -> None:
    with pytest.raises(AdapterError, match="no ProDiaL adapter"):
        push_adapter(Model(), "me/x")
    assert hub.calls == [{"token": None}]
