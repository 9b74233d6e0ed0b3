"""A run of a few steps on the tiny model, and the model that it started from or wrote."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from prodial_kernels.models.loading.load import load_model
from prodial_kernels.training import (
    Callback,
    FinetuneConfig,
    FinetuneResult,
    finetune,
    finetuning,
)


def run(
    place: Path,
    output: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    draws: bool = False,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune the model in ``place`` on the text there; ``options`` go before the defaults.

    Without ``draws`` the picture of the loss, which takes as long as all steps, is an empty file.
    """
    defaults = {
        "model": str(place / "model"),
        "data": str(place / "text.txt"),
        "steps": 12,
        "batch_size": 4,
        "seq_len": 32,
        "eval_every": 5,
        "save_every": 4,
        "warmup": 2,
        "lr": 0.01,
        "device": "cpu",
    }
    config = FinetuneConfig(output=str(output), **{**defaults, **options})
    picture = nullcontext() if draws else mock.patch.object(finetuning, "plot_loss", _empty_file)
    with picture:
        return finetune(config, resume=resume, progress=progress, callbacks=callbacks)


def _empty_file(records: Any, path: Path, *, title: str) -> None:
    path.write_bytes(b"")


def load(path: Path) -> Any:
    """The model in a folder."""
    return load_model(str(path), device=torch.device("cpu"), dtype=torch.float32).model
