"""The optimisers on offer, what they need, and their state through a save."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.training.run.state import Position, load_state, save_state
from prodial_kernels.training.step.optimizers import (
    OptimizerError,
    adapter_parameter_groups,
    is_capturable,
    make_capturable,
    make_optimizer,
    set_learning_rate,
)
from support.models import build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class _Stored(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does: an int, shared maps, buffers that it makes itself."""

    shared = torch.arange(4.0)

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.made: list[torch.Tensor] = []

    def init_state(self, group: Any, p: torch.Tensor, gindex: int, pindex: int) -> None:
        assert self.param_groups[gindex]["params"][pindex] is p
        moments = torch.zeros(p.shape, dtype=torch.uint8)
        self.made.append(moments)
        self.state[p] = {"step": 0, "state1": moments, "qmap1": self.shared}

    def step(self, closure: Any = None) -> None:
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if not self.state[p]:
                    self.init_state(group, p, gindex, pindex)
                self.state[p]["step"] += 1
                self.state[p]["state1"] += 3


def _model() -> nn.Module:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2))
    return model


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return adapter_parameter_groups(model, weight_decay=0.1)


def test_adamw_is_fused_on_cuda_only() -> None:
    model = _model()
    assert not make_optimizer("adamw", _groups(model), lr=0.1, device=CPU).defaults["fused"]
    assert make_optimizer("adamw", _groups(model), lr=0.1, device=CUDA).defaults["fused"]


def test_only_fused_adamw_can_be_captured() -> None:
    model = _model()
    fused = torch.optim.AdamW(_groups(model), lr=0.1, fused=True)
    assert is_capturable(fused)
    assert not is_capturable(torch.optim.AdamW(_groups(model), lr=0.1))
    assert not is_capturable(_Stored(_groups(model), 0.1))
    make_capturable(fused)
    rates = [group["lr"] for group in fused.param_groups]
    set_learning_rate(fused, 0.25)
    assert [float(rate) for rate in rates] == [0.25, 0.25]
    unfused = torch.optim.AdamW(_groups(model), lr=0.1)
    set_learning_rate(unfused, 0.5)
    assert [group["lr"] for group in unfused.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("kind", "name"), [("adamw8bit", "AdamW8bit"), ("paged_adamw8bit", "PagedAdamW8bit")]
)
def test_bitsandbytes(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = types.ModuleType("bitsandbytes.optim")
    setattr(optim, name, _Stored)
    package = types.ModuleType("bitsandbytes")
    package.optim = optim  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    groups = _groups(_model())
    made = make_optimizer(kind, groups, lr=0.1, device=CUDA)
    assert isinstance(made, _Stored)
    # The scale is not decayed.
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in made.param_groups[1]["params"])
    with pytest.raises(OptimizerError, match=f"'{kind}' needs a CUDA device.*use 'adamw'"):
        make_optimizer(kind, groups, lr=0.1, device=CPU)


def test_bitsandbytes_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OptimizerError, match="pip install bitsandbytes, or use optimizer 'adamw'"):
        make_optimizer("adamw8bit", _groups(_model()), lr=0.1, device=CUDA)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'paged_adamw8bit', got 'sgd'"):
        make_optimizer("sgd", [], lr=0.1, device=CPU)


def test_state_that_an_optimiser_makes_itself_comes_back(tmp_path: Path) -> None:
    model = _model()
    optimizer = _Stored(_groups(model), 0.1)
    optimizer.step()
    optimizer.step()
    path = save_state(tmp_path, Position(step=2), model, optimizer)
    other = _Stored(_groups(model), 0.1)
    load_state(path, model, other)
    for parameter, state in optimizer.state.items():
        assert type(other.state[parameter]["step"]) is int
        assert other.state[parameter]["step"] == 2
        assert torch.equal(other.state[parameter]["state1"], state["state1"])
        # In the optimiser's own buffers.
        assert any(other.state[parameter]["state1"] is made for made in other.made)


def test_state_of_an_optimiser_whose_rate_is_a_tensor_comes_back(tmp_path: Path) -> None:
    model = _model()

    def make() -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(_groups(model), lr=0.1, fused=True)
        make_capturable(optimizer)
        return optimizer

    optimizer = make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    path = save_state(tmp_path, Position(step=1), model, optimizer)
    other = make()
    load_state(path, model, other)
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            assert torch.equal(other.state[parameter][kind], value)
