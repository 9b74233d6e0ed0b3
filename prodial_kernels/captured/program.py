"""What is known of one kind of batch: how its blocks were called, then the graphs of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from prodial_kernels.captured.calls import Kind, flatten, rebuild_call
from prodial_kernels.captured.checkpointing import is_checkpointed, not_checkpointing
from prodial_kernels.captured.deferred import Deferral
from prodial_kernels.captured.engine import Graphed, Leaf, Section, Source
from prodial_kernels.captured.state import BlockState

Place = tuple[int, int] | int
"""Where a tensor was first met: as a result (block, number), or as the nth other tensor."""


class Before(NamedTuple):
    """A result of the block before, in the same section."""

    result: int


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
        result_strides: Of each.
        drawn: The state of the generator before and after.
        memory: Bytes that tensors took before and after.
        obstacle: Why it cannot be captured, if so.
    """

    key: Any
    leaves: list[Kind] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    result: Any = None
    results: list[Kind] = field(default_factory=list)
    result_strides: list[tuple[int, ...]] = field(default_factory=list)
    drawn: tuple[Any, Any] = (0, 0)
    memory: tuple[int, int] = (0, 0)
    obstacle: str | None = None

    @property
    def draws(self) -> bool:
        """Whether random numbers were drawn."""
        return bool(self.drawn[0] != self.drawn[1])


@dataclass
class Program:
    """Records by block, then the graphs of those that can be captured.

    Attributes:
        warm: Steps that were taken as they are, backward included.
        finished: Whether the last one's backward has been.
        order: The blocks that are captured.
        members: Of each section, its blocks.
        positions: Of blocks among the sections.
        takes: Where each block's leaves are.
        early: Sections of several blocks that need nothing but what the first is given, and draw no
            random numbers: they may be replayed for nothing.
        numbers: Of the tensors that are written before a replay.
        shared: Which of these several sections read.
        plain: Nothing of it can be captured.
    """

    warm: int = 0
    finished: bool = False
    records: dict[int, Record] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    graphs: list[Graphed] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    takes: dict[int, list[Leaf | Before]] = field(default_factory=dict)
    early: set[int] = field(default_factory=set)
    numbers: dict[Place, int] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()
    plain: bool = False

    def plan(
        self,
        blocks: Sequence[nn.Module],
        states: Sequence[BlockState],
        device: torch.device,
        *,
        together: bool,
    ) -> list[Section]:
        """Return what to capture: the blocks without an obstacle, in order.

        With ``together``, those that take nothing but what the one before returned, and what needs
        no gradient, make one section.
        """
        for index, record in self.records.items():
            if any(parameter._backward_hooks for parameter in states[index].parameters):
                record.obstacle = "a parameter of it has hooks, which would run twice"
        self.order = [
            index for index, record in sorted(self.records.items()) if not record.obstacle
        ]
        self.members = []
        for index in self.order:
            before = self.members[-1][-1] if self.members else None
            if together and before is not None and self._joins(blocks, before, index):
                self.members[-1].append(index)
            else:
                self.members.append([index])
        self.positions = {
            index: position for position, members in enumerate(self.members) for index in members
        }
        sections: list[Section] = []
        for members in self.members:
            for index in members:
                self.takes[index] = self._leaves(self.records[index], self.positions[index])
            section = self._section(members, blocks, states, device)
            first = {leaf.place for leaf in self.takes[members[0]] if isinstance(leaf, Leaf)}
            if not section.draws and all(leaf.place in first for leaf in section.leaves):
                self.early.add(len(sections))
            sections.append(section)
        uses = [leaf.place for section in sections for leaf in section.leaves]
        self.shared = frozenset(
            place for place in uses if isinstance(place, int) and uses.count(place) > 1
        )
        return sections

    def kept(self) -> int:
        """Bytes that the forwards of all blocks leave; 0 if some are not captured."""
        if len(self.order) < len(self.records):
            return 0
        first, last = self.records[self.order[0]], self.records[self.order[-1]]
        return max(last.memory[1] - first.memory[0], 0)

    def _joins(self, blocks: Sequence[nn.Module], before: int, index: int) -> bool:
        first, second = self.records[before], self.records[index]
        if any(hooked(blocks[one]) or _checkpoints(blocks[one]) for one in (before, index)):
            return False
        if first.key[2] != second.key[2] or first.drawn[1] != second.drawn[0]:
            return False
        for kind, place in zip(second.leaves, second.places, strict=True):
            comes = isinstance(place, tuple) and place[0] == before
            # Of what comes from elsewhere, a later block of the section reads no result.
            if not comes and (kind.requires_grad or isinstance(place, tuple)):
                return False
        of_first = any(isinstance(place, tuple) and place[0] == before for place in second.places)
        others = (record for number, record in self.records.items() if number != index)
        return of_first and not any(
            isinstance(place, tuple) and place[0] == before
            for record in others
            for place in record.places
        )

    def _section(
        self,
        members: Sequence[int],
        blocks: Sequence[nn.Module],
        states: Sequence[BlockState],
        device: torch.device,
    ) -> Section:
        functions = [
            _function(index, blocks[index], self.records[index], device.type) for index in members
        ]
        takes = [self.takes[index] for index in members]
        # Blocks may share what is trained.
        trained = {id(p): p for index in members for p in states[index].parameters}
        return Section(
            name_of(members[0], blocks[members[0]], members[-1]),
            functions[0] if len(members) == 1 else _together(functions, takes),
            tuple(leaf for taken in takes for leaf in taken if isinstance(leaf, Leaf)),
            tuple(trained.values()),
            _checkpoints(blocks[members[0]]),
            any(self.records[index].draws for index in members),
            len(members),
        )

    def _leaves(self, record: Record, position: int) -> list[Leaf | Before]:
        leaves: list[Leaf | Before] = []
        for kind, stride, place in zip(record.leaves, record.strides, record.places, strict=True):
            where: Source | int
            if isinstance(place, tuple) and place[0] in self.positions:
                if self.positions[place[0]] == position:
                    leaves.append(Before(place[1]))
                    continue
                where = Source(self.positions[place[0]], place[1])
            else:
                # Also what a block returns that is not captured.
                where = self.numbers.setdefault(place, len(self.numbers))
            leaves.append(Leaf(kind.shape, stride, kind.dtype, kind.requires_grad, where))
        return leaves


class Pass:
    """One forward through the blocks.

    Attributes:
        cursor: Of the captured blocks, the one whose turn it is.
        deferral: The calls of the section whose turn it is, but for the last.
        leaves: What it takes, so far.
        placed: Which of these is read from where.
        started: Whether its forward has been replayed.
        returned: What sections have returned in it, as long as it lives, and its version.
        written: What was written for several sections, and its version.
    """

    def __init__(self, program: Program) -> None:
        """Begin it."""
        self.program = program
        self.cursor = 0
        self.deferral: Deferral | None = None
        self.leaves: list[Tensor] = []
        self.placed: dict[int, Tensor] = {}
        self.started = False
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


def name_of(index: int, block: nn.Module, last: int | None = None) -> str:
    """A block, or one and those until the last, in a message."""
    if last is not None and last != index:
        return f"blocks {index} to {last} ({type(block).__name__} and so on)"
    return f"block {index}, a {type(block).__name__},"


def hooked(block: nn.Module) -> bool:
    """Whether something would see what a block is given or returns."""
    return bool(
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
        or _has_any_global_hook()
    )


def _checkpoints(block: nn.Module) -> bool:
    return any(map(is_checkpointed, block.modules()))


def _together(
    functions: Sequence[Callable[[Sequence[Tensor]], list[Tensor]]],
    takes: Sequence[Sequence[Leaf | Before]],
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def function(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        results: list[Tensor] = []
        for one, taken in zip(functions, takes, strict=True):
            results = one(
                [results[t.result] if isinstance(t, Before) else next(given) for t in taken]
            )
        return results

    return function


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
