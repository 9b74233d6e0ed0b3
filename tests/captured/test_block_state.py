"""Whether a block is still what it was when it was captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear
from prodial_kernels.captured.state import BlockState


def block() -> Any:
    layer = ProdialLinear.from_linear(nn.Linear(4, 4), r=2)
    return nn.ModuleDict({"proj": layer, "norm": nn.LayerNorm(4), "drop": nn.Dropout(0.1)})


def _merge(one: Any) -> None:
    one.proj.merge()


def _replaced(one: Any) -> None:
    one.norm.weight = nn.Parameter(torch.ones(4))


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "adapter off": (lambda b: b.proj.enable_adapter(False), "adapter_enabled of a module is False"),
    "merged": (_merge, "replaced, added or removed"),
    "another parameter": (_replaced, "replaced, added or removed"),
    "another module": (lambda b: b.update({"norm": nn.LayerNorm(4)}), "replaced, added"),
    "one more": (lambda b: b.proj.add_module("more", nn.Identity()), "replaced, added"),
    "frozen": (lambda b: b.norm.requires_grad_(False), "requires_grad of a tensor was changed"),
    "moved": (lambda b: b.double(), "moved in memory"),
    "a part in evaluation": (lambda b: b.drop.eval(), "training of a module is False"),
    "dropout": (lambda b: setattr(b.drop, "p", 0.2), "p of a module is 0.2, not 0.1"),
    "another class": (
        lambda b: setattr(b.norm, "__class__", type("Norm", (nn.LayerNorm,), {})), "class"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_found(name: str) -> None:
    change, said = CHANGES[name]
    one = block()
    state = BlockState(one)
    assert state.change() is None
    change(one)
    found = state.change()
    assert found is not None
    assert said in found


def test_what_is_changed_in_place_is_none() -> None:
    one = block()
    state = BlockState(one)
    assert [id(p) for p in state.parameters] == [id(p) for p in one.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    one.proj.reset_adapter()
    one.load_state_dict(one.state_dict())
    one.train()
    assert state.change() is None


def test_a_list_that_is_changed_in_place_is_a_change() -> None:
    one = block()
    one.proj._active_adapter = ["default"]
    state = BlockState(one)
    one.proj._active_adapter.append("other")
    assert state.change() is not None
