"""Graphs on a CPU: sections that run again, in memory that is overwritten as the device's is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from prodial_kernels.captured.engine import Flat, Section, Source
from prodial_kernels.captured.leaves import OwnLeaves

Result = TypeVar("Result")


class StandIn:
    """Captures nothing, but keeps the same places and the same order as the real one.

    What a graph may overwrite is filled with NaN as soon as it may: a result once the section that
    reads it has run, a leaf's gradient after the next backward but one, all that a section kept
    after its backward.
    """

    device = torch.device("cpu")

    def __init__(self, *, waits: Sequence[str] = ()) -> None:
        self.captures = 0
        self.forwards = 0
        self.backwards = 0
        self.released = 0
        self.captured: list[Section] = []
        self._waits = waits

    def capture(self, sections: Sequence[Section], held: int = 0) -> list[Any]:
        self.captures += 1
        self.captured = list(sections)
        state = torch.get_rng_state()
        slots: dict[int, Tensor] = {}
        graphs: list[_Rerun] = []
        for section in sections:
            inputs = []
            for leaf in section.leaves:
                if isinstance(leaf.place, Source):
                    inputs.append(graphs[leaf.place.position].results[leaf.place.result])
                else:
                    if leaf.place not in slots:
                        slots[leaf.place] = torch.zeros(leaf.shape, dtype=leaf.dtype)
                    inputs.append(slots[leaf.place])
            graphs.append(_Rerun(self, section, inputs, graphs))
        for position in reversed(range(len(graphs))):
            graphs[position].prepare_backward(position)
        torch.set_rng_state(state)
        return graphs

    def last_read_by(self, position: int) -> list[Source]:
        last: dict[Source, int] = {}
        for number, section in enumerate(self.captured):
            for leaf in section.leaves:
                if isinstance(leaf.place, Source):
                    last[leaf.place] = number
        return [place for place, number in last.items() if number == position]

    def watched(self, function: Callable[[], Result]) -> tuple[Result, list[str]]:
        return function(), list(self._waits)

    def drawn(self) -> Any:
        return tuple(torch.get_rng_state().tolist())

    def allocated(self) -> int:
        return 0

    def busy(self) -> bool:
        return False

    def release(self) -> None:
        self.released += 1


class _Rerun:
    def __init__(
        self, engine: StandIn, section: Section, inputs: list[Tensor], before: list[_Rerun]
    ) -> None:
        self.engine, self.section, self.before, self.inputs = engine, section, before, inputs
        self.position = len(before)
        self.leaf_gradients: list[Tensor | None] = [None] * len(section.leaves)
        self.parameter_gradients: list[Flat] = []
        self._own = OwnLeaves(section.parameters, section.held)
        results = self._run()
        self.results = [result.detach().clone() for result in results]
        self.result_gradients: list[Tensor | None] = [
            torch.empty_like(result) if result.requires_grad else None for result in results
        ]
        self._kept: tuple[list[Tensor], list[Tensor]] | None = None

    def prepare_backward(self, position: int) -> None:
        """Let the section before leave its gradients where this one reads them, and so on."""
        for number, leaf in enumerate(self.section.leaves):
            if not leaf.requires_grad:
                continue
            static = torch.full(leaf.shape, math.nan, dtype=leaf.dtype)
            if isinstance(leaf.place, Source) and leaf.place.position == position - 1:
                self.before[position - 1].result_gradients[leaf.place.result] = static
            self.leaf_gradients[number] = static
        trained = self.section.parameters
        if trained:
            flat = torch.empty(sum(p.numel() for p in trained), dtype=trained[0].dtype)
            self.parameter_gradients = [Flat(flat, tuple(range(len(trained))))]

    def forward(self) -> Any:
        self.engine.forwards += self.section.blocks
        # As the real one's: of use where the same numbers are drawn again.
        given = torch.get_rng_state() if self.section.draws else None
        leaves = self._leaves()
        results = self._differentiable(leaves)
        for place, result in zip(self.results, results, strict=True):
            place.copy_(result.detach())
        if self.section.checkpointed:
            # It runs again on what it was given.
            self._kept = [leaf.detach().clone() for leaf in leaves], []
        else:
            self._kept = leaves, results
        for place in self.engine.last_read_by(self.position):
            self._poison([self.before[place.position].results[place.result]])
        return given

    def backward(self, given: Any) -> None:
        self.engine.backwards += self.section.blocks
        leaves, results = self._kept or ([], [])
        if self.section.checkpointed:
            state = torch.get_rng_state()
            if given is not None:
                torch.set_rng_state(given)
            wanted = [leaf.requires_grad for leaf in self.section.leaves]
            leaves = [
                leaf.requires_grad_() if one else leaf
                for leaf, one in zip(leaves, wanted, strict=True)
            ]
            results = self._differentiable(leaves)
            torch.set_rng_state(state)
        self._kept = None
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        pairs = [
            (result, gradient.clone())
            for result, gradient in zip(results, self.result_gradients, strict=True)
            if gradient is not None
        ]
        own = self._own.leaves
        found = torch.autograd.grad(
            [result for result, _ in pairs], [*inputs, *own], [g for _, g in pairs],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        self._poison([g for g in self.result_gradients if g is not None])
        places = [place for place in self.leaf_gradients if place is not None]
        for place, gradient in zip(places, found, strict=False):
            place.copy_(gradient)
        for flat in self.parameter_gradients:
            flat.tensor.copy_(torch.cat([g.reshape(-1) for g in found[len(inputs) :]]))

    def _leaves(self) -> list[Tensor]:
        return [
            static.clone().requires_grad_(leaf.requires_grad)
            for static, leaf in zip(self.inputs, self.section.leaves, strict=True)
        ]

    def _run(self) -> list[Tensor]:
        return self._differentiable(self._leaves())

    def _differentiable(self, leaves: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad(), self._own.in_place():
            results = self.section.function(leaves)
        # No graph could be recorded where others wait for a parameter's gradient.
        touched = {id(leaf) for leaf in leaves_of(results)}
        assert not touched & {id(p) for p in self.section.parameters}
        return results

    @staticmethod
    def _poison(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)


def leaves_of(results: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that autograd would accumulate gradients in."""
    seen: set[Any] = set()
    left: list[Any] = [result.grad_fn for result in results if result.grad_fn is not None]
    leaves = []
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions if following is not None]
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return leaves
