"""Examples from a data set on the hub, through the optional ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.findings import Findings
from prodial_kernels.training.data.schemas import parse_rows
from prodial_kernels.training.data.sources.paths import Candidates, example_candidates

# The order in which a data set's own splits are taken for the held-out side.
HELD_OUT_SPLITS = ("validation", "dev", "test")


def hub_candidates(source: str) -> tuple[Candidates, Candidates | None]:
    """Load a data set by its hub name, ``name`` or ``name:configuration``.

    Returns:
        The ``train`` split (or the only one), and the first of :data:`HELD_OUT_SPLITS` that the
        data set has, else ``None``.

    Raises:
        DataError: ``datasets`` is not installed, the data set cannot be loaded, or its rows follow
            no known schema.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is no file or directory here, and loading it from the hub needs the "
            "library 'datasets': pip install datasets"
        ) from error
    name, _, configuration = source.partition(":")
    try:
        splits = datasets.load_dataset(name, configuration or None, **_without_code(datasets))
    # Every release of the library raises other classes for a missing, gated or unreachable data
    # set; all mean the same to the caller, and the cause is kept.
    except Exception as error:
        raise DataError(
            f"{source!r} is no file or directory here, and the hub data set {name!r} could not be "
            f"loaded: {type(error).__name__}: {error}\nCheck the name, the configuration "
            "(NAME:CONFIGURATION) and the network, or download the data and give its path"
        ) from error
    available = list(splits)
    if not available:
        raise DataError(f"the hub data set {source!r} has no splits")
    train = "train" if "train" in available else available[0]
    held_out = next((s for s in HELD_OUT_SPLITS if s in available and s != train), None)
    if held_out is None:
        return _split(source, train, splits[train]), None
    sides = _split(source, train, splits[train]), _split(source, held_out, splits[held_out])
    for side in sides:
        side.findings.remark(
            f"of the splits {', '.join(available)}: {train} to train on, {held_out} held out"
        )
    return sides


def _without_code(datasets: Any) -> dict[str, bool]:
    """Options by which releases before 4 run no code of a data set; later ones have none to run."""
    major = int(str(getattr(datasets, "__version__", "4")).split(".")[0])
    return {"trust_remote_code": False} if major < 4 else {}


def _split(source: str, split: str, rows: Any) -> Candidates:
    def located() -> Iterator[tuple[str, Any]]:
        for index, row in enumerate(rows):
            yield f"{source}[{split}] row {index}", row

    findings = Findings()
    examples = parse_rows(located(), findings)
    return example_candidates(f"{source}[{split}]", examples, findings)
