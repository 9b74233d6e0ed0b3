"""What a recording reads instead of parameters: the same memory, other ends of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prodial_kernels.captured.leaves import Held, OwnLeaves
from support.captured.standin import leaves_of

DOUBLE = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}


class Twice(nn.Module):
    """One parameter under two names, and a trained buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 4, **DOUBLE))
        self.second = self.first
        self.third = nn.Parameter(torch.randn(3, **DOUBLE))
        self.register_buffer("shift", torch.randn(3, **DOUBLE).requires_grad_())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first.T @ self.second * self.third.sum() + self.shift.sum()


def own_of(module: Twice) -> OwnLeaves:
    held = [
        Held(module._parameters, "first", 0), Held(module._parameters, "second", 0),
        Held(module._parameters, "third", 1), Held(module._buffers, "shift", 2),
    ]  # fmt: skip
    return OwnLeaves([module.first, module.third, module.shift], held)


def test_gradients_are_those_of_the_parameters_and_end_elsewhere() -> None:
    module = Twice()
    module.first.mark = "kept"  # type: ignore[attr-defined]
    parameters = [module.first, module.third, module.shift]
    x = torch.randn(2, 4, **DOUBLE)
    expected = torch.autograd.grad(module(x).sum(), parameters)
    own = own_of(module)
    with own.in_place():
        assert module.first is module.second is not parameters[0]
        assert isinstance(module.first, nn.Parameter)
        assert module.first.mark == "kept"
        assert module.first.data_ptr() == parameters[0].data_ptr()
        root = module(x).sum()
    assert [module.first, module.third, module.shift] == parameters
    assert not {id(p) for p in parameters} & {id(leaf) for leaf in leaves_of([root])}
    found = own.gradients(root, torch.ones_like(root))
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_a_parameter_read_past_its_module_is_not_lost() -> None:
    module = Twice()
    kept = module.third
    own = own_of(module)
    x = torch.randn(2, 4, **DOUBLE)
    with own.in_place():
        root = (module(x) * kept.prod()).sum()
    found = own.gradients(root, torch.ones_like(root))
    expected = torch.autograd.grad((module(x) * kept.prod()).sum(), kept)
    assert found[1] is not None
    torch.testing.assert_close(found[1], expected[0])


def test_modules_get_their_parameters_back_after_an_error() -> None:
    module = Twice()
    before = module.first
    own = own_of(module)
    with pytest.raises(RuntimeError), own.in_place():
        module(torch.ones(2, 3, dtype=torch.float64))
    assert module.first is module.second is before
    unused = own.gradients(own.leaves[0].sum(), torch.ones((), dtype=torch.float64))
    assert unused[1] is None
