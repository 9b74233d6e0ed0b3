"""Examples from a data set on the hub, through the optional ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prodial_kernels.training.data.examples import DataError
from prodial_kernels.training.data.findings import Findings
from prodial_kernels.training.data.schemas import parse_rows
from prodial_kernels.training.data.sources.paths import Candidates, example_candidates
from prodial_kernels.training.data.sources.splits_of import train_and_held_out


def hub_candidates(source: str) -> tuple[Candidates, Candidates | None]:
    """Load a data set by its hub name, ``name`` or ``name:configuration``.

    Returns:
        As :func:`~prodial_kernels.training.data.sources.splits_of.train_and_held_out`.

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
    return train_and_held_out(
        splits, f"the hub data set {source!r}", lambda split: _split(source, split, splits[split])
    )


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
