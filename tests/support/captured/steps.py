"""Steps of a captured model, and of one that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.captured.checkpointing import checkpoints_outside
from prodial_kernels.captured.model import capture_with
from support.captured.standin import StandIn
from support.models import token_ids


def step(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """One forward and backward; the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        assert torch.equal(gradient, other[name]), name


def warmed(
    model: nn.Module, ids: Tensor | None = None, *, together: bool = True, **options: Any
) -> StandIn:
    """Capture, and take the steps after which replaying begins."""
    engine = StandIn()
    captured = capture_with(model, engine, together=together)
    model.captured = [captured]  # type: ignore[assignment]
    for _ in range(2):
        step(model, token_ids() if ids is None else ids, **options)
    model.zero_grad(set_to_none=True)
    assert engine.captures == 0
    return engine


def release(model: nn.Module) -> None:
    for captured in model.captured:
        captured.release()
    del model.captured


def compared(
    model: nn.Module, run: Callable[[nn.Module], Any], *, replays: int, exact: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    """``run`` returns what must be equal, captured and not."""
    plain = copy.deepcopy(model)
    engine = warmed(model, **options)
    torch.manual_seed(5)
    found = run(model), gradients(model)
    torch.manual_seed(5)
    expected = run(plain), gradients(plain)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found, expected, **tolerance)
    assert engine.forwards == engine.backwards == replays
    release(model)


def checkpointing(model: nn.Module, reentrant: bool = False) -> nn.Module:
    if checkpoints_outside(model.backbone.layers[0]):
        pytest.skip("this transformers checkpoints around a block's forward")
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    return model
