"""Results of blocks that have not run: what is known of them, and what becomes of whoever reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels.captured.calls import kind_of
from prodial_kernels.captured.deferred import Deferral, Deferred, Unreadable, with_content

AUTOCAST = (False, torch.bfloat16)


def deferral(x: Tensor) -> tuple[Deferral, list[Tensor]]:
    """Two blocks, the second of which adds 1 to what the first has doubled."""
    made = Deferral("blocks 0 to 2", "cpu", AUTOCAST)
    results: Sequence[Tensor] = [x]
    found = []
    for function in (lambda t: [t[0] * 2], lambda t: [t[0] + 1]):
        made.add(function, results)
        results = made.results([(kind_of(x), x.stride())])
        found += results
    return made, found


def test_what_is_known_is_answered_without_running() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    made, (first, second) = deferral(x)
    assert isinstance(second, Tensor)
    assert type(second) is Deferred
    assert second.shape == (2, 3)
    assert (second.dtype, second.device, second.ndim) == (x.dtype, x.device, 2)
    assert second.size(1) == 3
    assert second.stride() == (3, 1)
    assert second.requires_grad
    assert second.is_floating_point()
    assert kind_of(second) == kind_of(x)
    made.begin()
    with pytest.raises(Unreadable, match="is read after the last of them has run"):
        second.sum()
    assert first.shape == (2, 3)


@pytest.mark.parametrize("inference", [False, True])
def test_what_reads_one_runs_the_blocks_with_their_gradients(inference: bool) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    made, (first, second) = deferral(x)
    read = []
    made.read = lambda: read.append(1)
    with torch.set_grad_enabled(not inference):
        assert torch.equal(second.mean(), (2 * x + 1).mean())
    assert torch.equal(torch.cat([first, second]), torch.cat([2 * x, 2 * x + 1]))
    assert torch.equal(copy.copy(second), 2 * x + 1)
    (with_content({"a": (second,)})["a"][0].sum() + second.sum()).backward()
    assert torch.equal(x.grad, torch.full((2, 3), 4.0))
    assert read == [1]


def test_a_function_that_cannot_be_told_is_refused() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.content() * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    class View(Double):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return x * 2

    _, (_, second) = deferral(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(Unreadable, match="a function of autograd"):
        View.apply(second)
    found = Double.apply(second)
    with pytest.raises(Unreadable, match="a function of autograd"):
        found.sum().backward()


def test_an_input_that_was_changed_in_place_is_refused() -> None:
    x = torch.randn(2, 3)
    made, (_, second) = deferral(x)
    x.add_(1)
    with pytest.raises(Unreadable, match="changed in place before the last"):
        second.sum()
    with pytest.raises(Unreadable, match="changed in place before the last"):
        made.begin()


def test_who_keeps_one_is_known() -> None:
    made, found = deferral(torch.randn(2, 3))
    assert made.kept()
    assert made.is_last(found[1], 0)
    assert not made.is_last(found[0], 0)
    del found[0]
    assert not made.kept()
