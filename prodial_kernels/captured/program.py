"""What is known of one shape of batches: how each block was called, then the blocks' graphs."""

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

RECOMPUTED_FROM = 16
"""Number of blocks from which on the first ones are recomputed in backward."""

RECOMPUTED = 3
"""How many: they make room for what the first backward makes beside what all blocks keep."""

Origin = tuple[int, int] | int
"""Where a tensor comes from: result (block, number), or the nth tensor from outside the blocks."""


class Before(NamedTuple):
    """A result of the block before, in the same section."""

    result: int


class Taken(NamedTuple):
    """A tensor among the arguments of a recorded call."""

    kind: Kind
    stride: tuple[int, ...]
    origin: Origin

    def is_result_of(self, block: int) -> bool:
        """Whether the block of this number returned it."""
        return isinstance(self.origin, tuple) and self.origin[0] == block


class Given(NamedTuple):
    """A tensor in the result of a recorded call."""

    kind: Kind
    stride: tuple[int, ...]


@dataclass
class Record:
    """One eager call of a block, as a graph of it would have to repeat it.

    Attributes:
        key: What every replayed call must share: the structure of the arguments, the kinds of the
            tensors in them, autocast, and whether the block is checkpointed.
        leaves: The tensors in the arguments.
        result: The structure of the result.
        results: The tensors in it.
        drawn: State of the random generator before and after.
        memory: Bytes of large tensors that were allocated before and after.
        obstacle: Why the block cannot be captured; None if it can.
    """

    key: Any
    leaves: list[Taken] = field(default_factory=list)
    result: Any = None
    results: list[Given] = field(default_factory=list)
    drawn: tuple[Any, Any] = (0, 0)
    memory: tuple[int, int] = (0, 0)
    obstacle: str | None = None

    @property
    def draws(self) -> bool:
        """Whether random numbers were drawn."""
        return bool(self.drawn[0] != self.drawn[1])


@dataclass
class Program:
    """The records of one shape by block, then the graphs of the blocks that can be captured.

    Attributes:
        warm: Eager steps so far, backward included.
        finished: Whether the backward of the last step has run.
        records: The last eager call of each block.
        sections: What is captured, in order.
        graphs: Of each section.
        order: The blocks that are captured.
        members: The blocks of each section.
        positions: The section of each captured block.
        takes: For each captured block, where its tensors are read from.
        speculative: Sections whose forward may be replayed at their first block's call, in vain if
            the next call differs: it takes only that block's tensors and draws no random numbers.
        numbers: Slot of each tensor from outside, which is written before a replay.
        shared: Slots that several sections read.
        plain: Whether nothing can be captured.
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
    speculative: set[int] = field(default_factory=set)
    numbers: dict[Origin, int] = field(default_factory=dict)
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
        """Return the sections to capture: the blocks without an obstacle, in order.

        With ``together``, consecutive blocks of which each takes only results of the one before and
        tensors without a gradient make one section.

        The first of many blocks are recomputed in backward. The graphs' memory is theirs alone,
        so what backward needs at its start, when everything is kept, cannot be what the loss has
        needed before, as in an eager step; what those blocks do not keep is that.
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
            if before in self._recomputed[-1:]:
                before = None
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
                self.speculative.add(len(sections))
            sections.append(section)
        uses = [leaf.place for section in sections for leaf in section.leaves]
        self.shared = frozenset(
            place for place in uses if isinstance(place, int) and uses.count(place) > 1
        )
        return sections

    @property
    def _recomputed(self) -> list[int]:
        return self.order[:RECOMPUTED] if len(self.order) >= RECOMPUTED_FROM else []

    def held(self) -> int:
        """About the most bytes of large tensors that blocks hold; 0 if some are not captured.

        They hold it when backward begins: what all forwards keep, and for what the first backward
        makes as much again as one of them keeps.
        """
        if len(self.order) < len(self.records):
            return 0
        before = [self.records[index].memory[0] for index in self.order]
        kept = self.records[self.order[-1]].memory[1] - before[len(self._recomputed)]
        return max(kept + (before[1] - before[0] if len(before) > 1 else 0), 0)

    def _joins(self, blocks: Sequence[nn.Module], before: int, index: int) -> bool:
        first, second = self.records[before], self.records[index]
        if any(hooked(blocks[one]) or _checkpoints(blocks[one]) for one in (before, index)):
            return False
        if first.key[2] != second.key[2] or first.drawn[1] != second.drawn[0]:
            return False
        for taken in second.leaves:
            # Besides results of the block before, a later block of a section takes only tensors
            # from outside the blocks, without a gradient.
            outside = not isinstance(taken.origin, tuple) and not taken.kind.requires_grad
            if not (outside or taken.is_result_of(before)):
                return False
        readers = {
            number
            for number, record in self.records.items()
            if any(taken.is_result_of(before) for taken in record.leaves)
        }
        return readers == {index}

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
        recomputed = members[0] in self._recomputed
        numbers = {key: number for number, key in enumerate(trained)}
        held = [place for index in members for place in states[index].held(numbers)]
        return Section(
            name_of(members[0], blocks[members[0]], members[-1]),
            functions[0] if len(members) == 1 else _together(functions, takes),
            tuple(leaf for taken in takes for leaf in taken if isinstance(leaf, Leaf)),
            tuple(trained.values()),
            recomputed or _checkpoints(blocks[members[0]]),
            any(self.records[index].draws for index in members),
            len(members),
            tuple(held),
        )

    def _leaves(self, record: Record, position: int) -> list[Leaf | Before]:
        leaves: list[Leaf | Before] = []
        for kind, stride, origin in record.leaves:
            place: Source | int
            if isinstance(origin, tuple) and origin[0] in self.positions:
                if self.positions[origin[0]] == position:
                    leaves.append(Before(origin[1]))
                    continue
                place = Source(self.positions[origin[0]], origin[1])
            else:
                # Results of blocks that are not captured too.
                place = self.numbers.setdefault(origin, len(self.numbers))
            leaves.append(Leaf(kind.shape, stride, kind.dtype, kind.requires_grad, place))
        return leaves


@dataclass(eq=False)
class Pass:
    """One forward through the blocks.

    Attributes:
        program: Of its shape.
        cursor: Position in ``program.order`` of the next call.
        deferral: The deferred calls of the current section; None before its first.
        leaves: The tensors that the current section was given so far.
        placed: The tensor for each slot of the current section.
        started: Whether the current section's forward was replayed already, speculatively.
        returned: A weak reference to each section's result, and its version.
        written: The tensor in each slot that several sections read, and its version.
    """

    program: Program
    cursor: int = 0
    deferral: Deferral | None = None
    leaves: list[Tensor] = field(default_factory=list)
    placed: dict[int, Tensor] = field(default_factory=dict)
    started: bool = False
    returned: dict[Source, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)
    written: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = field(default_factory=dict)
    _numbers: int = 0

    def origin_of(self, leaf: Tensor) -> Origin:
        """Return where a tensor comes from; one that is new comes from outside the blocks."""
        noted = self._origins.get(id(leaf))
        # A tensor that is gone may have had the same id.
        if noted is not None and noted[0]() is leaf:
            return noted[1]
        self.note_origin(leaf, self._numbers)
        self._numbers += 1
        return self._numbers - 1

    def note_origin(self, tensor: Tensor, origin: Origin) -> None:
        """Remember where a tensor comes from."""
        self._origins[id(tensor)] = (weakref.ref(tensor), origin)


def name_of(index: int, block: nn.Module, last: int | None = None) -> str:
    """Return what messages call a block, or a range of them."""
    if last is not None and last != index:
        return f"blocks {index} to {last} ({type(block).__name__} and so on)"
    return f"block {index}, a {type(block).__name__},"


def hooked(block: nn.Module) -> bool:
    """Whether a hook would see what a block is given or returns."""
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
        # Casts that autocast has cached outside the graph must not be read inside.
        autocast = torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
        upstream: Any = block.forward
        with not_checkpointing(block), autocast:
            result = getattr(upstream, "upstream", upstream)(*args, **kwargs)
        results: list[Tensor] = []
        if flatten(result, results) != record.result:
            raise RuntimeError(f"{name_of(index, block)} returns something else than before")
        return results

    return function
