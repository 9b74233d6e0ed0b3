"""The training state on disk: everything needed to continue a run bit for bit, without pickle.

A state is a directory ``step-000100`` with ``tensors.safetensors`` (trained parameters, optimiser
moments, random generators) and ``state.json`` (position and the checksum of the tensors). It
appears by a rename, so that a state that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.training.atomic import atomic_directory, write_safetensors
from prodial_kernels.training.optimizers import restore_state, state_tensors

FORMAT_VERSION = 1
KEPT_STATES = 2
_TENSORS = "tensors.safetensors"
_POSITION = "state.json"


class StateError(RuntimeError):
    """A saved training state is damaged, or belongs to another model."""


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        step: Optimiser steps done.
        micro_batches: Micro-batches used: the place in the data.
        tokens: Input tokens read, padding included.
        seconds: Time spent in training steps, over all parts of an interrupted run.
    """

    step: int = 0
    micro_batches: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(
    folder: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Save the state after ``position.step`` steps and remove all but the newest two.

    Args:
        folder: The directory that holds the run's states.
        position: Where the run stands.
        model: Its parameters with ``requires_grad`` are saved.
        optimizer: Its per-parameter tensors are saved; learning rates follow from the step.

    Returns:
        The new state's directory.

    Raises:
        OSError: The disk is full or cannot be written. Earlier states are untouched.
    """
    tensors = _random_states()
    for name, parameter in _trained(model).items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in state_tensors(optimizer, parameter).items():
            tensors[f"optimizer/{name}/{key}"] = value
    path = folder / f"step-{position.step:06d}"
    with atomic_directory(path, replace=True) as temporary:
        write_safetensors(temporary / _TENSORS, {k: v.cpu() for k, v in tensors.items()})
        described = {
            "format_version": FORMAT_VERSION,
            "position": asdict(position),
            "sha256": _checksum(temporary / _TENSORS),
            "torch": torch.__version__,
        }
        (temporary / _POSITION).write_text(json.dumps(described, indent=2), encoding="utf-8")
    # A killed process may have left a state half written.
    for old in (*saved_states(folder)[:-KEPT_STATES], *folder.glob(".step-*")):
        shutil.rmtree(old, ignore_errors=True)
    return path


def saved_states(folder: Path) -> list[Path]:
    """Return the states in a directory, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Bring model, optimiser and random generators to a saved state.

    Everything is checked before anything is changed.

    Args:
        path: A directory of :func:`saved_states`.
        model: The model of the run, with the same parameters trained.
        optimizer: An optimiser over exactly those parameters, without state.

    Returns:
        The position to continue from.

    Raises:
        StateError: Files are missing, damaged, or of another model or version.
    """
    described = _read_description(path)
    tensors = _read_tensors(path, described["sha256"])
    trained = _trained(model)
    expected = {f"parameter/{name}": parameter.shape for name, parameter in trained.items()}
    saved = {name: t.shape for name, t in tensors.items() if name.startswith("parameter/")}
    if saved != expected:
        wrong = sorted(
            name.removeprefix("parameter/")
            for name in saved.keys() | expected.keys()
            if saved.get(name) != expected.get(name)
        )
        raise StateError(
            f"{path}: its trained parameters are not this model's; {len(wrong)} differ, such as "
            f"{wrong[0]}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in trained.items():
        prefix = f"optimizer/{name}/"
        states[parameter] = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
    restore_state(optimizer, states)
    _restore_random_states(tensors)
    return Position(**described["position"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _random_states() -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _read_description(path: Path) -> dict[str, Any]:
    file = path / _POSITION
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        version = described["format_version"]
        complete = {"position", "sha256"} <= described.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION or not complete:
        raise StateError(
            f"{file}: format version {version}, this program reads version {FORMAT_VERSION}; "
            "continue with the version that wrote it"
        )
    return dict(described)


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = path / _TENSORS
    try:
        found = _checksum(file)
    except OSError as error:
        raise StateError(f"{file}: cannot be read: {error.strerror or error}") from error
    if found != sha256:
        raise StateError(f"{file}: damaged: its checksum is not the one in {_POSITION}")
    return dict(load_file(file))


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
