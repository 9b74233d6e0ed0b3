"""One forward through captured blocks: whether a call equals the recorded one, and its replay."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from prodial_kernels.captured.calls import flatten, rebuild, rebuild_call
from prodial_kernels.captured.deferred import Deferral, Deferred
from prodial_kernels.captured.engine import Source
from prodial_kernels.captured.program import Before, Pass, hooked
from prodial_kernels.captured.replay import Pending, Replay, Run


def difference(run: Pass, index: int, key: Any, leaves: list[Tensor]) -> str | None:
    """Say how this call differs from the recorded one; None if it does not."""
    program = run.program
    record = program.records[index]
    if run.cursor >= len(program.order) or program.order[run.cursor] != index:
        return "the blocks ran in another order"
    if key != record.key:
        return _key_difference(key, record.key)
    for leaf, expected in zip(leaves, program.takes[index], strict=True):
        if isinstance(expected, Before):
            same = run.deferral is not None and run.deferral.is_last(leaf, expected.result)
        elif isinstance(expected.place, Source):
            reference, version = run.returned.get(expected.place, (None, 0))
            same = reference is not None and reference() is leaf and leaf._version == version
        else:
            same = type(leaf) is not Deferred
            # Blocks of one section that were given the same tensor read one slot.
            if same and run.placed.setdefault(expected.place, leaf) is not leaf:
                return "it is given another tensor than the block before"
        if not same:
            return "its input is not what the block before returned"
    return None


def between(blocks: Sequence[nn.Module], run: Pass, index: int, last: bool) -> str | None:
    """Say what would see a result between two blocks of one section; None if nothing would."""
    program = run.program
    if last and run.deferral is None:
        return None
    if hooked(blocks[index]):
        return "has hooks by now"
    if run.deferral is not None and run.deferral.kept():
        return "is called while what an earlier one has returned is kept"
    if not last and hooked(blocks[program.order[run.cursor + 1]]):
        return "is followed by one that has hooks by now"
    return None


def defer(
    run: Pass,
    index: int,
    function: Callable[[Sequence[Any]], list[Tensor]],
    leaves: list[Tensor],
    read: Callable[[], None],
) -> Any:
    """Return deferred results of a block; the graph that it shares with the next is replayed later.

    Args:
        run: The forward that this call is of.
        index: Of the block.
        function: Calls the block eagerly, if a result is read before.
        leaves: The tensors in its arguments.
        read: Called when a result is read before the graph is replayed.
    """
    program = run.program
    record = program.records[index]
    if run.deferral is None:
        section = program.sections[program.positions[index]]
        run.deferral = Deferral(
            section.name, program.graphs[0].inputs[0].device.type, record.key[2], read
        )
        position = program.positions[index]
        if position in program.speculative:
            # The device need not wait for the calls that follow. If one of them differs, this
            # replay was in vain.
            graphed = program.graphs[position]
            for leaf, expected, static in zip(leaves, section.leaves, graphed.inputs, strict=False):
                if isinstance(expected.place, int):
                    _write(run, expected.place, static, leaf)
            graphed.forward()
            run.started = True
    run.leaves += [leaf for leaf in leaves if type(leaf) is not Deferred]
    run.deferral.add(function, leaves)
    results = run.deferral.results(record.results)
    return rebuild(record.result, iter(results))


def replay(run: Pass, index: int, leaves: list[Tensor], pending: Pending) -> Any:
    """Replay the section that ends with this block; return the block's result."""
    program = run.program
    position = program.positions[index]
    graphed, section = program.graphs[position], program.sections[position]
    started = run.started
    run.started = False
    run.placed.clear()
    if run.deferral is not None:
        leaves = run.leaves + [leaf for leaf in leaves if type(leaf) is not Deferred]
        run.deferral.begin()
        run.deferral, run.leaves = None, []
    internal: list[weakref.ref[Tensor] | None] = []
    wanted: list[Tensor] = []
    for leaf, expected, static in zip(leaves, section.leaves, graphed.inputs, strict=True):
        place = expected.place
        if isinstance(place, int) and not started:
            _write(run, place, static, leaf)
        if expected.requires_grad:
            wanted.append(leaf)
            # A gradient keeps its memory until the next section's backward only.
            tracked = isinstance(place, Source) and place.position == position - 1
            tracked = tracked and not (leaf._backward_hooks or leaf.retains_grad)
            internal.append(weakref.ref(leaf) if tracked else None)
    results = Replay.apply(
        Run(graphed, section, pending, internal, started), *wanted, *section.parameters
    )
    for number, result in enumerate(results):
        run.returned[Source(position, number)] = (weakref.ref(result), result._version)
    return rebuild(program.records[index].result, iter(results))


def call_eagerly(
    upstream: Callable[..., Any], structure: Any, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """Call a block's own forward; return the tensors in its result."""
    args, kwargs = rebuild_call(structure, leaves)
    results: list[Tensor] = []
    flatten(upstream(*args, **kwargs), results)
    return results


def _write(run: Pass, place: int, static: Tensor, leaf: Tensor) -> None:
    """Copy a leaf to the slot that the graph reads, unless an earlier block of this pass has."""
    if place in run.program.shared:
        written = run.written.get(place)
        if written is not None and written[0] is leaf and written[1] == leaf._version:
            return
        run.written[place] = (leaf, leaf._version)
    static.copy_(leaf.detach())


def _key_difference(found: Any, expected: Any) -> str:
    if found[2] != expected[2]:
        return "autocast is set otherwise"
    if found[3] != expected[3]:
        return "gradient checkpointing is set otherwise"
    if found[0] != expected[0]:
        return "its arguments have another structure"
    return "its arguments have other shapes or dtypes, or require gradients otherwise"
