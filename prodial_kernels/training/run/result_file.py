"""``results.json``: what a finished run came to, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from prodial_kernels.training.merging import Agreement
from prodial_kernels.training.results import FinetuneResult
from prodial_kernels.training.run.directory import RunDirectory


def read_result(
    folder: RunDirectory, say: Callable[[str], None] = lambda message: None
) -> FinetuneResult | None:
    """Return the result of the run in a directory; None if it is not finished.

    It is finished when its results, its adapter and its written model are all there; it may have
    been moved since. ``say`` is told of results that cannot be read.
    """
    file = folder.results_file
    if not file.is_file():
        return None
    try:
        result = result_of(json.loads(file.read_text(encoding="utf-8")), folder)
        # It must be good for being shown.
        str(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        say(f"{file} cannot be read ({type(error).__name__}: {error}): finishing the run again")
        return None
    missing = [
        p for p in (result.adapter_dir, result.model_dir) if p is not None and not p.is_dir()
    ]
    if missing:
        say(f"{missing[0]} is gone: finishing the run again")
        return None
    return result


def result_of(values: dict[str, Any], folder: RunDirectory) -> FinetuneResult:
    """Return the result that :meth:`FinetuneResult.to_dict` has described, of the run in a folder.

    Raises:
        KeyError, TypeError: They describe none.
    """
    known = {field.name for field in fields(FinetuneResult)}
    full = values["method"] == "full"
    values = values | {
        "agreement": Agreement(**values["agreement"]),
        "output": folder.path,
        "adapter_dir": None if full else folder.adapter,
        "model_dir": None
        if values["model_dir"] is None
        else (folder.full_model if full else folder.merged),
    }
    return FinetuneResult(**{k: v for k, v in values.items() if k in known})
