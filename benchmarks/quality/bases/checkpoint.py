"""The state of a pretraining in a bounded number of bytes, in parts that a transfer takes.

Matrices are kept in 16 bits (or 32), vectors in 32. Of Adam's second moment of a matrix, the means
of its rows and columns are kept, as Adafactor keeps them (arXiv:1804.04235); the first moment, of
ten steps' memory, starts again at zero. So a checkpoint has little more than two bytes a parameter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

__all__ = ["PART_BYTES", "CheckpointError", "load_state", "read_record", "restore", "save_state"]

PART_BYTES = 12 * 2**20
_RECORD = "state.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, or does not fit the model."""


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Write a checkpoint over the one before; return its bytes.

    Args:
        folder: Gets ``state.0``, ``state.1``, … of at most :data:`PART_BYTES`, and ``state.json``.
        model: Its parameters.
        optimizer: An AdamW over them.
        record: Whatever else must be known to go on; JSON values.
        dtype: Of matrices.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(model).items():
        value = parameter.detach()
        tensors[f"w/{name}"] = value.to(dtype if value.ndim > 1 else torch.float32).cpu()
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state:
            second = state["exp_avg_sq"].float().reshape(value.shape[0], -1)
            if value.ndim > 1:
                tensors[f"rows/{name}"] = second.mean(1).cpu()
                tensors[f"columns/{name}"] = second.mean(0).cpu()
            else:
                tensors[f"v/{name}"] = second.reshape(value.shape).cpu()
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    folder.mkdir(parents=True, exist_ok=True)
    parts = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
    hashes = [hashlib.sha256(part).hexdigest() for part in parts]
    for i, part in enumerate(parts):
        (folder / f"next.{i}").write_bytes(part)
    text = json.dumps({**record, "parts": hashes}, indent=1) + "\n"
    (folder / "next.json").write_text(text, encoding="utf-8")
    # Renaming takes microseconds; a kill in between is found by the hashes.
    for i in range(len(parts)):
        os.replace(folder / f"next.{i}", folder / f"state.{i}")
    os.replace(folder / "next.json", folder / _RECORD)
    return len(data)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what :func:`save_state` was given beside the model; None where nothing was saved."""
    path = folder / _RECORD
    record: dict[str, Any] | None = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    )
    return record


def load_state(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint.

    Raises:
        CheckpointError: A part is missing or of another checkpoint.
    """
    record = read_record(folder)
    if record is None:
        raise CheckpointError(f"checkpoint: expected {folder / _RECORD}, found none")
    data = bytearray()
    for i, expected in enumerate(record["parts"]):
        path = folder / f"state.{i}"
        part = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(part).hexdigest() != expected:
            found = "another checkpoint's" if part else "missing"
            raise CheckpointError(f"checkpoint: {path} is {found}; fetch all parts of one save")
        data += part
    return load(bytes(data))


def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
) -> None:
    """Put a checkpoint into a model, and into its optimiser.

    Args:
        tensors: What :func:`load_state` returned.
        model: Of the same shape.
        optimizer: An AdamW over the model's parameters, without a step made.
        step: Steps that the optimiser has made, for its bias correction.

    Raises:
        CheckpointError: Other names or shapes.
    """
    named = _named(model)
    saved = {name[2:] for name in tensors if name.startswith("w/")}
    if saved != named.keys():
        raise CheckpointError(
            f"checkpoint: its parameters are of another model: {sorted(saved ^ named.keys())[:4]}"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            value = tensors[f"w/{name}"]
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"checkpoint: {name} is {list(value.shape)}, the model's "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(value)
            if optimizer is None or not (f"rows/{name}" in tensors or f"v/{name}" in tensors):
                continue
            if f"v/{name}" in tensors:
                second = tensors[f"v/{name}"]
            else:
                rows, columns = tensors[f"rows/{name}"], tensors[f"columns/{name}"]
                second = torch.outer(rows, columns) / rows.mean().clamp(min=1e-30)
            capturable = any(group.get("capturable") for group in optimizer.param_groups)
            where = parameter.device if capturable else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=where),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": second.reshape(parameter.shape).to(parameter),
            }
