"""The training state on disk: everything needed to continue a run bit for bit, without pickle.

A state is a directory ``step-000100`` with ``tensors.safetensors`` (trained parameters, optimiser
moments, random generators) and ``state.json``: which run it is of, its position, the checksum of
the tensors with the names, shapes and dtypes of all of them, and a checksum of all that. It appears
by a rename, so that a state that exists is complete.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prodial_kernels.checkpoint.adapter import describe_tensor
from prodial_kernels.files.atomic import atomic_directory, remove_files, write_safetensors
from prodial_kernels.files.sha256 import sha256_of_file, sha256_of_values
from prodial_kernels.training.distributed.world import World
from prodial_kernels.training.run.versions import versions
from prodial_kernels.training.step.optimizers import check_state, restore_state, state_tensors
from prodial_kernels.training.step.out_of_memory import random_states, restore_random_states

FORMAT_VERSION = 2
KEPT_STATES = 2
TENSORS = "tensors.safetensors"
_POSITION = "state.json"
_RANDOM = re.compile(r"random/([1-9]\d{0,6}/)?(cpu|cuda)")
_LEFTOVER = re.compile(r"\.step-\d+\..*\b(partial|previous)")


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
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: str = "",
    random: Sequence[Mapping[str, Tensor]] = (),
) -> Path:
    """Save the state after ``position.step`` steps and remove all but the newest two.

    Args:
        folder: The directory that holds the run's states; no other process writes to it.
        position: Where the run stands.
        model: Its parameters with ``requires_grad`` are saved.
        optimizer: Its per-parameter tensors are saved; learning rates follow from the step.
        run: Fingerprint of the run that this is a state of.
        random: Of every process of the run, in order, what :func:`random_states` returns there;
            by default of this one alone.

    Raises:
        OSError: The disk is full or cannot be written. Earlier states are untouched.
    """
    tensors = {
        _random_name(process, kind): state
        for process, states in enumerate(random or [random_states()])
        for kind, state in states.items()
    }
    for name, parameter in trained_parameters(model).items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in state_tensors(optimizer, parameter).items():
            tensors[f"optimizer/{name}/{key}"] = value
    described = {
        "format_version": FORMAT_VERSION,
        "run": run,
        "position": asdict(position),
        "made_with": {**surroundings(), "processes": str(max(1, len(random)))},
    }
    path = write_saved(folder, position.step, _POSITION, tensors, described)
    for old in saved_states(folder)[:-KEPT_STATES]:
        remove_files(old, [TENSORS, _POSITION])
    remove_half_written(folder)
    return path


def write_saved(
    folder: Path,
    step: int,
    description: str,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
) -> Path:
    """Write tensors and a JSON file of that name, with checksums, to ``folder/step-…``.

    The directory appears whole, by a rename; OSError where it cannot be written.
    """
    path = folder / f"step-{step:06d}"
    with atomic_directory(path, own_files=lambda _: [TENSORS, description]) as temporary:
        write_safetensors(temporary / TENSORS, {k: v.cpu() for k, v in tensors.items()})
        values = {
            **described,
            "tensors": {name: describe_tensor(tensor) for name, tensor in tensors.items()},
            "sha256": sha256_of_file(temporary / TENSORS),
        }
        values["checksum"] = sha256_of_values(values)
        (temporary / description).write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path


def remove_half_written(folder: Path) -> None:
    """Remove what a killed process left of :func:`write_saved`."""
    for leftover in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def gather_random_states(world: World) -> list[dict[str, Tensor]]:
    """Return what :func:`random_states` returns in every process of a run, by number."""
    if world.size == 1:
        return [random_states()]
    own = {kind: bytes(state.tolist()).hex() for kind, state in random_states().items()}
    return [
        {kind: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
         for kind, text in states.items()}
        for states in world.gather(own)
    ]  # fmt: skip


def surroundings() -> dict[str, str]:
    """Return what decides the last bits of a run without being an option of it."""
    return {**versions(), "threads": str(torch.get_num_threads())}


def saved_states(folder: Path) -> list[Path]:
    """Return the states in a directory, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def steps_of(folder: Path) -> list[int]:
    """Return the steps of the states in a directory, in order."""
    return [int(path.name.removeprefix("step-")) for path in saved_states(folder)]


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: str = "",
    fits: Callable[[Position], bool] = lambda _: True,
    process: int = 0,
) -> Position:
    """Bring model, optimiser and random generators to a saved state.

    Everything is checked before anything is changed.

    Args:
        path: A directory of :func:`saved_states`.
        model: The model of the run, with the same parameters trained.
        optimizer: An optimiser over exactly those parameters, without state.
        run: Fingerprint of the run that is continued.
        fits: Whether a run can be at a position.
        process: The number of this process in its run. Where the state holds no generators of it,
            it keeps its own.

    Raises:
        StateError: Files are missing, damaged, or of another run, model or version.
    """
    described = _read_description(path)
    if described["run"] != run:
        raise StateError(
            f"{path}: is a state of another run, or run.json was changed since it was saved"
        )
    position = _read_position(path, described["position"])
    if not fits(position):
        raise StateError(f"{path}: the run never is at {position}")
    tensors = _read_tensors(path, described)
    trained = trained_parameters(model)
    _check_parameters(path, tensors, trained)
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in trained.items():
        prefix = f"optimizer/{name}/"
        moments[parameter] = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
    if position.step and not any(moments.values()):
        raise StateError(f"{path}: holds no moments of the optimiser")
    _check_random_states(path, tensors, process)
    try:
        check_state(optimizer, moments, position.step)
        restore_state(optimizer, moments)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        optimizer.state.clear()
        raise StateError(
            f"{path}: its moments are not this optimiser's: {type(error).__name__}: {error}"
        ) from error
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    restore_random_states(
        {
            kind: tensors[name]
            for kind in ("cpu", "cuda")
            if (name := _random_name(process, kind)) in tensors
        }
    )
    return position


def differing_surroundings(path: Path, *, processes: int = 1) -> list[str]:
    """Return in what a state was saved otherwise than this run would, in words."""
    found = _read_description(path).get("made_with")
    # Earlier versions had but one.
    saved = {"processes": "1", **(found if isinstance(found, Mapping) else {})}
    return [
        f"{what} {now} (was {saved.get(what, 'unknown')})"
        for what, now in {**surroundings(), "processes": str(processes)}.items()
        if saved.get(what) != now
    ]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _random_name(process: int, kind: str) -> str:
    return f"random/{process}/{kind}" if process else f"random/{kind}"


def _check_random_states(path: Path, tensors: Mapping[str, Tensor], process: int) -> None:
    on_cpu, on_cuda = _random_name(process, "cpu"), _random_name(process, "cuda")
    if process and on_cpu not in tensors:
        return
    try:
        # A generator of its own checks more than the shape.
        torch.Generator().set_state(tensors[on_cpu])
        if on_cuda in tensors and torch.cuda.is_available():
            torch.Generator("cuda").set_state(tensors[on_cuda])
    except (KeyError, TypeError, RuntimeError) as error:
        raise StateError(f"{path}: holds no usable random state: {error}") from error


def _check_parameters(
    path: Path, tensors: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter]
) -> None:
    expected = {f"parameter/{name}": describe_tensor(p) for name, p in trained.items()}
    parameters = {name: t for name, t in tensors.items() if name.startswith("parameter/")}
    saved = {name: describe_tensor(tensor) for name, tensor in parameters.items()}
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
    known = {*expected, *(name for name in tensors if _RANDOM.fullmatch(name))}
    known |= {name for name in tensors if _owner(name) in trained}
    strange = sorted(tensors.keys() - known)
    if strange:
        raise StateError(f"{path}: holds {strange[0]}, which is of no parameter of this model")
    for name, tensor in parameters.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise StateError(f"{path}: {name.removeprefix('parameter/')} is not finite")


def _owner(name: str) -> str:
    """The parameter that an optimiser's tensor is of; a parameter's name may hold a slash."""
    return name.removeprefix("optimizer/").rpartition("/")[0] if name[:1] == "o" else ""


def _read_description(path: Path) -> dict[str, Any]:
    file = path / _POSITION
    try:
        if not file.is_file():
            raise FileNotFoundError("no such regular file")
        described = json.loads(file.read_text(encoding="utf-8"))
        version = described["format_version"]
        checksum = described.pop("checksum", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise StateError(
            f"{file}: format version {version}, this program reads version {FORMAT_VERSION}; "
            "continue with the version that wrote it"
        )
    if checksum != sha256_of_values(described):
        raise StateError(f"{file}: damaged or changed: its checksum does not match")
    missing = sorted({"run", "position", "tensors", "sha256"} - described.keys())
    if missing:
        raise StateError(f"{file}: cannot be read: {', '.join(missing)} missing")
    return dict(described)


def _read_position(path: Path, values: Any) -> Position:
    try:
        position = Position(**values)
        counts = (position.step, position.micro_batches, position.tokens)
        good = all(type(count) is int and count >= 0 for count in counts)
        good &= type(position.seconds) in (int, float) and 0 <= position.seconds < math.inf
    except TypeError as error:
        raise StateError(f"{path / _POSITION}: position cannot be read: {error}") from error
    if not good:
        raise StateError(f"{path / _POSITION}: position {values} cannot be")
    if path.name != f"step-{position.step:06d}":
        raise StateError(f"{path}: is the state after step {position.step}, by its {_POSITION}")
    return position


def _read_tensors(path: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = path / TENSORS
    try:
        if not file.is_file():
            raise FileNotFoundError("no such regular file")
        found = sha256_of_file(file)
    except OSError as error:
        raise StateError(f"{file}: cannot be read: {error.strerror or error}") from error
    if found != described["sha256"]:
        raise StateError(f"{file}: damaged: its checksum is not the one in {_POSITION}")
    try:
        tensors = dict(load_file(file))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise StateError(f"{file}: cannot be read: {error}") from error
    if {name: describe_tensor(tensor) for name, tensor in tensors.items()} != described["tensors"]:
        raise StateError(f"{file}: its tensors are not those that {_POSITION} lists")
    return tensors
