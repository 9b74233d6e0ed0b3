"""Which splits of a data set are trained on and held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.sources.paths import Candidates

# The order in which a data set's own splits are taken for the held-out side.
HELD_OUT_SPLITS = ("validation", "dev", "test")


def train_and_held_out(
    splits: Iterable[str], name: str, read: Callable[[str], Candidates]
) -> tuple[Candidates, Candidates | None]:
    """Read the ``train`` split (or the first) and the first of :data:`HELD_OUT_SPLITS`.

    Args:
        splits: Names of those that there are.
        name: The data set, for people.
        read: Reads one.

    Returns:
        Both; None for the second where there is none. DataError where there are no splits.
    """
    available = list(splits)
    if not available:
        raise DataError(f"{name} has no splits")
    train = "train" if "train" in available else available[0]
    held_out = next((s for s in HELD_OUT_SPLITS if s in available and s != train), None)
    if held_out is None:
        return read(train), None
    sides = read(train), read(held_out)
    for side in sides:
        side.findings.remark(
            f"of the splits {', '.join(available)}: {train} to train on, {held_out} held out"
        )
    return sides
