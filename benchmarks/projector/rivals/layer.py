"""A projector made ready by a rival, and the step that is timed on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prodial_kernels.testing import LinearCase


@dataclass
class Layer:
    """What is called, and what trains: leaves under the names that the check compares."""

    forward: Callable[[Tensor], Tensor]
    trained: dict[str, Tensor]


def leaves(case: LinearCase, *names: str) -> dict[str, Tensor]:
    """Return the named operands as fresh leaves that require gradients."""
    return {name: getattr(case, name).detach().requires_grad_() for name in names}


@dataclass
class Step:
    """One forward, or forward and backward, of a layer on fixed operands.

    Backward asks for the gradient of x and of everything that trains, and drops them.
    """

    layer: Layer
    x: Tensor
    weight: Tensor
    grad_output: Tensor
    names: tuple[str, ...]

    @classmethod
    def on(cls, case: LinearCase, prepare: Callable[[LinearCase], Layer]) -> Step:
        """Prepare a layer from the case's operands."""
        layer = prepare(case)
        return cls(
            layer, case.x.detach().requires_grad_(), case.weight, case.grad_output,
            ("x", *layer.trained),
        )  # fmt: skip

    def forward(self) -> Tensor:
        """The output, with its graph."""
        return self.layer.forward(self.x)

    def forward_only(self) -> None:
        """The forward as training runs it; the output is dropped."""
        self.forward()

    def both(self) -> None:
        """Forward and backward."""
        self._gradients(self.forward())

    def results(self) -> dict[str, Tensor]:
        """``output`` and ``d_<name>`` for every gradient."""
        output = self.forward()
        gradients = self._gradients(output)
        named = dict(zip((f"d_{name}" for name in self.names), gradients, strict=True))
        return {"output": output.detach(), **named}

    def _gradients(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, [self.x, *self.layer.trained.values()], self.grad_output)
