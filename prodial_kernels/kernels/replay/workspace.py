"""Temporaries side by side in one allocation. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What the caching allocator aligns to, so that a temporary looks as if it came from there.
ALIGNMENT = 512


@dataclass(frozen=True)
class Lifetime:
    """A temporary of ``size`` bytes that the steps from ``first`` to ``last`` use."""

    size: int
    first: int
    last: int


def pack(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Place temporaries so that those alive at the same step do not overlap.

    The largest go first, each to the lowest place that is free for all of its life.

    Returns:
        (offset of each in bytes, bytes in all).
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: -lifetimes[i].size):
        one = lifetimes[index]
        neighbours = sorted(
            (offsets[other], offsets[other] + lifetimes[other].size)
            for other in placed
            if lifetimes[other].first <= one.last and one.first <= lifetimes[other].last
        )
        at = 0
        for start, end in neighbours:
            if at + one.size <= start:
                break
            at = max(at, _aligned(end))
        offsets[index] = at
        placed.append(index)
    return offsets, max((offsets[i] + lifetimes[i].size for i in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
