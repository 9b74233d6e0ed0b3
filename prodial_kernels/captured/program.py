"""What is known of one kind of batch: how its blocks were called, then the graphs of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.captured.calls import Kind, flatten, rebuild_call
from prodial_kernels.captured.checkpointing import is_checkpointed, not_checkpointing
from prodial_kernels.captured.engine import Graphed, Leaf, Section, Source
from prodial_kernels.captured.state import BlockState

Place = tuple[int, int] | int
"""Where a tensor was first met: as a result (block, number), or as the nth other tensor."""


@dataclass
class Record:
    """What one call of a block was like.

    Attributes:
        key: What must be the same in every call that the graph stands for: the structure of the
            arguments, the kinds of the tensors in them, autocast, and whether it is checkpointed.
        leaves: The tensors in the arguments.
        strides: Of each.
        places: Where each was first met.
        result: The structure of the result.
        results: The tensors in it.
        draws: Whether random numbers were drawn.
        obstacle: Why it cannot be captured, if so.
    """

    key: Any
    leaves: list[Kind] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    result: Any = None
    results: list[Kind] = field(default_factory=list)
    draws: bool = False
    obstacle: str | None = None


@dataclass
class Program:
    """Records by block, then the graphs of those that can be captured.

    Attributes:
        warm: Steps that were taken as they are, backward included.
        finished: Whether the last one's backward has been.
        positions: Of blocks among the sections.
        numbers: Of the tensors that are written before a replay.
        shared: Which of these several sections read.
        plain: Nothing of it can be captured.
    """

    warm: int = 0
    finished: bool = False
    records: dict[int, Record] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    graphs: list[Graphed] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    numbers: dict[Place, int] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()
    plain: bool = False

    def plan(
        self, blocks: Sequence[nn.Module], states: Sequence[BlockState], device: torch.device
    ) -> list[Section]:
        """Return what to capture: the blocks without an obstacle, in order."""
        for index, record in self.records.items():
            if any(parameter._backward_hooks for parameter in states[index].parameters):
                record.obstacle = "a parameter of it has hooks, which would run twice"
        chosen = [index for index, record in sorted(self.records.items()) if not record.obstacle]
        self.positions = {index: position for position, index in enumerate(chosen)}
        sections = [
            Section(
                name_of(index, blocks[index]),
                _function(index, blocks[index], self.records[index], device.type),
                self._leaves(self.records[index]),
                tuple(states[index].parameters),
                any(map(is_checkpointed, blocks[index].modules())),
                self.records[index].draws,
            )
            for index in chosen
        ]
        uses = [leaf.place for section in sections for leaf in section.leaves]
        self.shared = frozenset(
            place for place in uses if isinstance(place, int) and uses.count(place) > 1
        )
        return sections

    def _leaves(self, record: Record) -> tuple[Leaf, ...]:
        leaves = []
        for kind, stride, place in zip(record.leaves, record.strides, record.places, strict=True):
            if isinstance(place, tuple) and place[0] in self.positions:
                where: Source | int = Source(self.positions[place[0]], place[1])
            else:
                # Also what a block returns that is not captured.
                where = self.numbers.setdefault(place, len(self.numbers))
            leaves.append(Leaf(kind.shape, stride, kind.dtype, kind.requires_grad, where))
        return tuple(leaves)


class Pass:
    """One forward through the blocks.

    Attributes:
        cursor: The section whose turn it is.
        returned: What sections have returned in it, as long as it lives, and its version.
        written: What was written for several sections, and its version.
    """

    def __init__(self, program: Program) -> None:
        """Begin it."""
        self.program = program
        self.cursor = 0
        self.returned: dict[Source, tuple[weakref.ref[Tensor], int]] = {}
        self.written: dict[int, tuple[Tensor, int]] = {}
        self._met: dict[int, tuple[weakref.ref[Tensor], Place]] = {}
        self._numbers = 0

    def place_of(self, leaf: Tensor) -> Place:
        """Where a tensor was met first: now, if never."""
        met = self._met.get(id(leaf))
        # Another tensor may have had its identity.
        if met is not None and met[0]() is leaf:
            return met[1]
        self.meet(leaf, self._numbers)
        self._numbers += 1
        return self._numbers - 1

    def meet(self, tensor: Tensor, place: Place) -> None:
        """Remember a tensor."""
        self._met[id(tensor)] = (weakref.ref(tensor), place)


def name_of(index: int, block: nn.Module) -> str:
    """A block, in a message."""
    return f"block {index}, a {type(block).__name__},"


def _function(
    index: int, block: nn.Module, record: Record, device_type: str
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    structure, _, (enabled, dtype), _ = record.key

    def function(tensors: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = rebuild_call(structure, tensors)
        # What autocast has cast elsewhere must not be read here.
        autocast = torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
        upstream: Any = block.forward
        with not_checkpointing(block), autocast:
            result = getattr(upstream, "upstream", upstream)(*args, **kwargs)
        results: list[Tensor] = []
        if flatten(result, results) != record.result:
            raise RuntimeError(f"{name_of(index, block)} returns something else than before")
        return results

    return function
