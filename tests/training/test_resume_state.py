"""Training states on disk: the same trajectory after loading; a failed save loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels.training import atomic, state
from prodial_kernels.training.state import (
    Position,
    StateError,
    load_state,
    save_state,
    saved_states,
)


class _Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, width).requires_grad_(False)
        self.trained = nn.Linear(width, 2)


def _optimizer(model: _Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.trained.parameters(), lr=0.1, weight_decay=0.1)


def _step(model: _Net, optimizer: torch.optim.Optimizer) -> float:
    """One step that draws random numbers, as dropout does."""
    loss = model.trained(model.frozen(torch.rand(5, 3))).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _trained(steps: int) -> tuple[_Net, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = _Net()
    optimizer = _optimizer(model)
    for _ in range(steps):
        _step(model, optimizer)
    return model, optimizer


def test_continues_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = _trained(3)
    position = Position(step=3, micro_batches=6, tokens=99, seconds=1.5)
    path = save_state(tmp_path, position, model, optimizer)
    expected = [_step(model, optimizer) for _ in range(4)]

    torch.manual_seed(1)
    again = _Net()
    optimizer = _optimizer(again)
    torch.manual_seed(999)
    assert load_state(path, again, optimizer) == position
    assert [_step(again, optimizer) for _ in range(4)] == expected
    assert torch.equal(again.trained.weight, model.trained.weight)


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    model, optimizer = _trained(0)
    path = save_state(tmp_path, Position(), model, optimizer)
    expected = _step(model, optimizer)
    torch.manual_seed(1)
    again = _Net()
    optimizer = _optimizer(again)
    load_state(path, again, optimizer)
    assert _step(again, optimizer) == expected


def test_holds_no_pickle_and_no_frozen_weight(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    path = save_state(tmp_path, Position(step=1), model, optimizer)
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())
    from safetensors.torch import load_file

    tensors = load_file(path / "tensors.safetensors")
    assert not [name for name in tensors if "frozen" in name]
    assert {name.split("/")[0] for name in tensors} == {"parameter", "optimizer", "random"}


def test_keeps_the_newest_two(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    (tmp_path / ".step-000004.partial").mkdir()
    for step in (5, 90, 1_000_000, 1_000_010):
        save_state(tmp_path, Position(step=step), model, optimizer)
    assert [p.name for p in saved_states(tmp_path)] == ["step-1000000", "step-1000010"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failing", ["write_safetensors", "flush"])
def test_a_full_disk_leaves_earlier_states_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model, optimizer = _trained(1)
    save_state(tmp_path, Position(step=1), model, optimizer)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(state if failing == "write_safetensors" else atomic, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, Position(step=2), model, optimizer)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    load_state(tmp_path / "step-000001", model, _optimizer(model))


def test_safetensors_own_error_becomes_an_oserror() -> None:
    from safetensors import SafetensorError

    with (
        pytest.raises(OSError, match="No space left") as caught,
        atomic.safetensors_errors(Path("x")),
    ):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    assert caught.value.errno == errno.ENOSPC


def _damage_tensors(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _truncate(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _remove_tensors(path: Path) -> None:
    (path / "tensors.safetensors").unlink()


def _spoil_json(path: Path) -> None:
    (path / "state.json").write_text("{")


def _other_version(path: Path) -> None:
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_tensors, "checksum"),
        (_truncate, "checksum"),
        (_remove_tensors, "cannot be read"),
        (_spoil_json, "cannot be read"),
        (_other_version, "version 99"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(
    tmp_path: Path, damage: Any, message: str
) -> None:
    model, optimizer = _trained(2)
    path = save_state(tmp_path, Position(step=2), model, optimizer)
    damage(path)
    other = _Net()
    before = other.trained.weight.clone()
    with pytest.raises(StateError, match=message):
        load_state(path, other, _optimizer(other))
    assert torch.equal(other.trained.weight, before)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    path = save_state(tmp_path, Position(step=1), model, optimizer)
    other = _Net(width=5)
    with pytest.raises(StateError, match=r"trained\.weight"):
        load_state(path, other, _optimizer(other))


def test_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic.atomic_directory(target) as folder:
        (folder / "file").write_text("old")
    # As a kill would leave it: the old directory moved aside, the new one complete, no rename.
    target.rename(tmp_path / ".model.previous")
    shutil.copytree(tmp_path / ".model.previous", tmp_path / ".model.partial")
    with (
        pytest.raises(RuntimeError, match="stop"),
        atomic.atomic_directory(target, replace=True) as folder,
    ):
        raise RuntimeError("stop")
    assert (target / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_rename_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic.atomic_directory(target) as folder:
        (folder / "file").write_text("old")
    rename = Path.rename

    def fail_for_new(self: Path, to: Any) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with (
        pytest.raises(OSError, match="broken"),
        atomic.atomic_directory(target, replace=True) as folder,
    ):
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_existing_directory_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError), atomic.atomic_directory(tmp_path / "model"):
        pass
