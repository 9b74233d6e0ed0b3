"""Paired tests and ranks, without further libraries."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence

__all__ = ["critical_difference", "friedman", "mean_ranks", "sign_flip", "spread"]

# q of the two-tailed Nemenyi test at 0.05 for 2, 3, … methods (Demšar 2006, table 5, continued by
# the studentised range at infinite degrees of freedom, over √2).
_NEMENYI = (
    1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164, 3.219, 3.268, 3.313, 3.354,
    3.391, 3.426, 3.458, 3.489, 3.517, 3.544,
)  # fmt: skip
_EXACT = 16  # differences up to which every pattern of signs is counted


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences, by flipping their signs.

    Exact up to 16 differences, else from 100,000 random patterns of a fixed seed.

    Raises:
        ValueError: No differences.
    """
    if not differences:
        raise ValueError("differences: expected at least one, got none")
    seen = abs(sum(differences)) - 1e-12
    if len(differences) <= _EXACT:
        patterns = itertools.product((1, -1), repeat=len(differences))
        sums = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns
        ]
        return sum(value >= seen for value in sums) / len(sums)
    draw = random.Random(0)
    count = 100_000
    as_large = 0
    for _ in range(count):
        bits = draw.getrandbits(len(differences))
        total = sum(d if bits >> i & 1 else -d for i, d in enumerate(differences))
        as_large += abs(total) >= seen
    return (as_large + 1) / (count + 1)


def sign_test(won: int, lost: int) -> float:
    """Two-sided p that so unequal counts would come of a fair coin; 1 of none.

    Raises:
        ValueError: A negative count.
    """
    if min(won, lost) < 0:
        raise ValueError(f"counts: expected none below 0, got {won} and {lost}")
    count, most = won + lost, max(won, lost)
    tail = sum(math.comb(count, k) for k in range(most, count + 1))
    return min(1.0, 2 * tail / 2**count)


def mean_ranks(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean rank of each method over tasks, 1 the best; equals share their ranks.

    Args:
        scores: Of each method, one per task, higher better.

    Raises:
        ValueError: Methods with different numbers of tasks.
    """
    lengths = {len(values) for values in scores.values()}
    if len(lengths) != 1:
        raise ValueError(f"scores: expected as many of every method, got {sorted(lengths)}")
    totals = dict.fromkeys(scores, 0.0)
    count = lengths.pop()
    for task in range(count):
        for name, values in scores.items():
            better = sum(other[task] > values[task] for other in scores.values())
            equal = sum(other[task] == values[task] for other in scores.values())
            totals[name] += better + (equal + 1) / 2
    return {name: total / count for name, total in totals.items()}


def friedman(ranks: Mapping[str, float], tasks: int) -> float:
    """Friedman's statistic of mean ranks; under the null about χ² with methods - 1 degrees."""
    k = len(ranks)
    spread = sum(rank**2 for rank in ranks.values()) - k * (k + 1) ** 2 / 4
    return 12 * tasks / (k * (k + 1)) * spread


def critical_difference(methods: int, tasks: int) -> float:
    """By how much mean ranks must differ to be told apart at 0.05 (Nemenyi).

    Raises:
        ValueError: Fewer than 2 or more than 20 methods, or no tasks.
    """
    if not 2 <= methods <= len(_NEMENYI) + 1 or tasks < 1:
        raise ValueError(f"expected 2 to 20 methods and a task, got {methods} and {tasks}")
    return _NEMENYI[methods - 2] * math.sqrt(methods * (methods + 1) / (6 * tasks))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
