"""The trained parameters of the best evaluations, kept while a run goes on.

``best/step-000100`` holds ``tensors.safetensors`` (the trained parameters after 100 steps) and
``best.json``: whose they are, the metrics, and checksums. It appears by a rename, like a state.

A killed run goes on from a saved state, and what it evaluated later is evaluated again. So of
every saved state the best evaluation before it stays here, until that state is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from prodial_kernels.checkpoint.adapter import describe_tensor
from prodial_kernels.files.atomic import remove_files
from prodial_kernels.files.sha256 import sha256_of_file, sha256_of_values
from prodial_kernels.training.results import improves
from prodial_kernels.training.run.state import (
    TENSORS,
    StateError,
    remove_half_written,
    saved_states,
    trained_parameters,
    write_saved,
)

_DESCRIPTION = "best.json"


@dataclass(frozen=True)
class Best:
    """A best evaluation whose parameters are kept.

    Attributes:
        step: Optimiser steps done before it.
        metrics: What it gave.
        path: Where the parameters are.
    """

    step: int
    metrics: Mapping[str, Any]
    path: Path


class BestKept:
    """Keeps the parameters of a run's best evaluations; no other process writes to the folder."""

    def __init__(
        self, folder: Path, model: nn.Module, *, run: str, step: int,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:  # fmt: skip
        """Continue after ``step``: what belongs to later, and to other runs, is removed.

        The evaluation at ``step`` itself, too, which is done again.

        Args:
            folder: Where they are kept.
            model: Its parameters with ``requires_grad`` are.
            run: Fingerprint of the run.
            step: Where it goes on.
            say: Told of what cannot be read.
        """
        self._folder = folder
        self._model = model
        self._run = run
        self._kept: list[Best] = []
        for path in saved_states(folder):
            try:
                best = self._read(path)
            except StateError as error:
                say(f"the parameters of an evaluation cannot be used: {error}")
                best = None
            if best is not None and best.step < step:
                self._kept.append(best)
            else:
                remove_files(path, [TENSORS, _DESCRIPTION])
        remove_half_written(folder)

    @property
    def best(self) -> Best | None:
        """The best so far; None before the first evaluation."""
        return self._kept[-1] if self._kept else None

    def offer(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Keep the model's parameters if the evaluation is the best so far; say whether it is.

        OSError where the disk is full or cannot be written; what was kept is untouched.
        """
        if self.best is not None and not improves(metrics, self.best.metrics):
            return False
        tensors = {name: p.detach() for name, p in trained_parameters(self._model).items()}
        described = {"run": self._run, "step": step, "metrics": dict(metrics)}
        path = write_saved(self._folder, step, _DESCRIPTION, tensors, described)
        self._kept.append(Best(step, dict(metrics), path))
        return True

    def prune(self, states: Sequence[int]) -> None:
        """Remove what neither the run nor one of its saved states, by their steps, needs."""
        needed = {best.step for best in self._kept[-1:]}
        for state in states:
            needed |= {best.step for best in [b for b in self._kept if b.step < state][-1:]}
        for best in self._kept:
            if best.step not in needed:
                remove_files(best.path, [TENSORS, _DESCRIPTION])
        self._kept = [best for best in self._kept if best.step in needed]

    def restore(self) -> Best:
        """Give the model the parameters of the best evaluation.

        StateError where they are gone or damaged; the model is as it was then.
        """
        from safetensors.torch import load_file

        best = self.best
        if best is None:
            raise StateError(f"{self._folder}: the parameters of the best evaluation are gone")
        described = _described(best.path)
        file = best.path / TENSORS
        try:
            if sha256_of_file(file) != described["sha256"]:
                raise ValueError("its checksum does not match")
            tensors = dict(load_file(file))
        except (OSError, ValueError, SafetensorError) as error:
            raise StateError(f"{file}: cannot be read: {error}") from error
        trained = trained_parameters(self._model)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])
        return best

    def _read(self, path: Path) -> Best | None:
        """What a directory holds; None if it is another run's."""
        described = _described(path)
        if described["run"] != self._run:
            return None
        expected = {n: describe_tensor(p) for n, p in trained_parameters(self._model).items()}
        if described["tensors"] != expected or path.name != f"step-{described['step']:06d}":
            raise StateError(f"{path}: its parameters are not this model's")
        return Best(described["step"], described["metrics"], path)


def _described(path: Path) -> dict[str, Any]:
    file = path / _DESCRIPTION
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if described.pop("checksum") != sha256_of_values(described):
            raise ValueError("its checksum does not match")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    return described
