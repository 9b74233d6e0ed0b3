"""Leaves of autograd for a recording, in the place of the parameters that a section trains.

A parameter's gradient ends in one node, which autograd makes when the parameter is first used and
keeps as long as anybody does: DistributedDataParallel from when a model is wrapped, any loss that
is still referred to. The engine lets the stream that this node was made on wait for every gradient,
and outside of a recording nothing may wait for what is inside. So a recording reads the same
memory by tensors of its own, whose nodes are made within it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """Where a module holds a parameter.

    Attributes:
        place: The module's dictionary of parameters or of buffers.
        name: The key there.
        parameter: The number of the parameter in its section.
    """

    place: dict[str, Any]
    name: str
    parameter: int


class OwnLeaves:
    """Stand-ins of parameters, in the same memory, each with a node of its own."""

    def __init__(self, parameters: Sequence[Tensor], held: Sequence[Held]) -> None:
        """Make them.

        Args:
            parameters: What is trained, each once.
            held: Every place of each that :meth:`in_place` is to change.
        """
        self._parameters = list(parameters)
        self._held = list(held)
        self.leaves = [_leaf(parameter) for parameter in parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules hold the stand-ins instead of the parameters."""
        for place, name, number in self._held:
            place[name] = self.leaves[number]
        try:
            yield
        finally:
            for place, name, number in self._held:
                place[name] = self._parameters[number]

    def gradients(
        self, root: Tensor, given: Tensor, besides: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """Return each parameter's gradient, None where ``root`` does not depend on it.

        What reads a parameter past its module is differentiated as it is, and added.

        Args:
            root: The result to differentiate.
            given: Its gradient.
            besides: Further leaves to run the graph towards; their gradients are dropped.
        """
        n = len(self._parameters)
        found = torch.autograd.grad(
            root, [*besides, *self.leaves, *self._parameters], given, allow_unused=True
        )[len(besides) :]
        return [
            past if own is None else own if past is None else own + past
            for own, past in zip(found[:n], found[n:], strict=True)
        ]


def _leaf(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, nn.Parameter):
        return parameter.detach().requires_grad_()
    leaf = nn.Parameter(parameter.detach())
    vars(leaf).update(vars(parameter))
    return leaf
