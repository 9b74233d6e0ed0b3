"""Training states on disk: the same trajectory after loading; a failed save loses nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prodial_kernels.files import atomic
from prodial_kernels.files.atomic import beside
from prodial_kernels.files.sha256 import sha256_of_file, sha256_of_values
from prodial_kernels.training.run import state
from prodial_kernels.training.run.loop import LoopOptions
from prodial_kernels.training.run.state import (
    Position,
    StateError,
    differing_surroundings,
    load_state,
    save_state,
    saved_states,
)
from prodial_kernels.training.run.versions import versions


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
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {oct(0o666 & ~_umask())}
    json.loads((path / "state.json").read_text())
    tensors = load_file(path / "tensors.safetensors")
    assert not [name for name in tensors if "frozen" in name]
    assert {name.split("/")[0] for name in tensors} == {"parameter", "optimizer", "random"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_keeps_the_newest_two(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    (tmp_path / ".step-000004.partial").mkdir()
    beside(tmp_path / "step-000004", "partial").mkdir()
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


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a state's description and repair its checksum, as who knows the format can."""
    file = path / "state.json"
    described = json.loads(file.read_text())
    change(described)
    described.pop("checksum", None)
    file.write_text(json.dumps({**described, "checksum": sha256_of_values(described)}))


def _retensor(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The same for its tensors."""
    file = path / "tensors.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    _rewrite(
        path,
        lambda d: d.update(
            sha256=sha256_of_file(file),
            tensors={name: state.describe_tensor(tensor) for name, tensor in tensors.items()},
        ),
    )


def _edit(path: Path, text: str, by: str) -> None:
    file = path / "state.json"
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, by))


def _flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _move(path: Path) -> None:
    path.rename(path.with_name("step-000003"))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


_SCALE = "parameter/trained.weight"
_MOMENT = "optimizer/trained.weight/exp_avg"
_STEP = "optimizer/trained.weight/step"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "checksum"),
        (lambda p: os.truncate(p / "tensors.safetensors", 100), "checksum"),
        (lambda p: (p / "tensors.safetensors").unlink(), "cannot be read"),
        (lambda p: _fifo(p / "tensors.safetensors"), "cannot be read"),
        (lambda p: (p / "state.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "state.json").write_text("[" * 100_000), "cannot be read: Recursion"),
        (lambda p: (p / "state.json").write_text("[]"), "cannot be read"),
        (lambda p: _fifo(p / "state.json"), "cannot be read"),
        (lambda p: _edit(p, '"format_version": 2', '"format_version": 1'), "format version 1"),
        # What is not under the tensors' checksum is under its own.
        (lambda p: _edit(p, '"step": 2', '"step": 1'), "damaged or changed"),
        (lambda p: _edit(p, '"micro_batches": 4', '"micro_batches": 0'), "damaged or changed"),
        (lambda p: _edit(p, '"run": "this"', '"run": "that"'), "damaged or changed"),
        # And with the checksum repaired the whole must still be what a run saves.
        (lambda p: _rewrite(p, lambda d: d.update(run="that")), "of another run"),
        (lambda p: _rewrite(p, lambda d: d.pop("position")), "position missing"),
        (lambda p: _rewrite(p, lambda d: d.update(position=[1])), "position cannot be read"),
        (lambda p: _rewrite(p, lambda d: d["position"].update(step=9)), "after step 9"),
        (lambda p: _rewrite(p, lambda d: d["position"].update(step=True)), "cannot be"),
        (lambda p: _rewrite(p, lambda d: d["position"].update(tokens=-1)), "cannot be"),
        (lambda p: _rewrite(p, lambda d: d["position"].update(seconds="1")), "cannot be"),
        (lambda p: _rewrite(p, lambda d: d.update(tensors=None)), "are not those that"),
        (lambda p: _retensor(p, lambda t: t.pop(_MOMENT)), "expected step, exp_avg"),
        (lambda p: _retensor(p, lambda t: t.update({_MOMENT: t[_MOMENT].half()})), "exp_avg must"),
        (lambda p: _retensor(p, lambda t: t.update({_MOMENT: torch.ones(3)})), "exp_avg must be"),
        (lambda p: _retensor(p, lambda t: t.update({_SCALE: t[_SCALE].half()})), r"1 differ.*trai"),
        (lambda p: _retensor(p, lambda t: t[_SCALE].fill_(float("nan"))), "weight is not finite"),
        (lambda p: _retensor(p, lambda t: t[_STEP].fill_(3)), "step must be a whole.*2, got 3"),
        (lambda p: _retensor(p, lambda t: t[_STEP].fill_(-1)), "step must be a whole.*got -1"),
        (lambda p: _retensor(p, lambda t: t[_STEP].fill_(0.5)), "step must be a whole.*got 0.5"),
        (lambda p: _retensor(p, lambda t: t[_STEP].fill_(float("nan"))), "whole.*got nan"),
        (lambda p: _retensor(p, lambda t: t.update(more=torch.ones(1))), "more, which is of no"),
        (lambda p: _retensor(p, lambda t: t.pop("random/cpu")), "no usable random state"),
        (lambda p: _retensor(p, lambda t: t.update({"random/cpu": torch.ones(9)})), "no usable"),
        (lambda p: _retensor(p, _forget), "no moments of the optimiser"),
        (_move, "is the state after step 2"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_changes_nothing(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    model, optimizer = _trained(2)
    position = Position(step=2, micro_batches=4, tokens=8)
    path = save_state(tmp_path, position, model, optimizer, run="this")
    damage(path)
    path = saved_states(tmp_path)[-1]
    other = _Net()
    other_optimizer = _optimizer(other)
    before = other.trained.weight.clone(), torch.get_rng_state()
    with pytest.raises(StateError, match=message):
        load_state(path, other, other_optimizer, run="this")
    assert torch.equal(other.trained.weight, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not other_optimizer.state


def _forget(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        del tensors[name]


def test_a_position_that_the_run_never_reaches_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained(2)
    path = save_state(tmp_path, Position(step=2, micro_batches=4), model, optimizer)
    fits = LoopOptions(steps=2, lr=0.1, grad_accumulation=2).reaches
    load_state(path, model, _optimizer(model), fits=fits)
    for options in (
        LoopOptions(steps=1, lr=0.1, grad_accumulation=2),
        LoopOptions(steps=5, lr=0.1, grad_accumulation=3),
    ):
        with pytest.raises(StateError, match="the run never is at"):
            load_state(path, model, _optimizer(model), fits=options.reaches)


def test_says_what_else_decides_the_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_state(tmp_path, Position(), *_trained(0))
    assert differing_surroundings(path) == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(state, "versions", lambda: {**versions(), "torch": "9.9"})
    found = differing_surroundings(path)
    assert [text.split(" (was ")[0] for text in found] == ["torch 9.9", "threads 7"]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    path = save_state(tmp_path, Position(step=1), model, optimizer)
    other = _Net(width=5)
    with pytest.raises(StateError, match=r"trained\.weight"):
        load_state(path, other, _optimizer(other))
