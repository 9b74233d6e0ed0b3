"""A quantised checkpoint that is read, trained on and merged."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training import FinetuneConfig, finetune
from support.tiny_model import write_text


def stored_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def check_training_and_merging(folder: Path, place: Path, weights: Collection[str]) -> None:
    """Training changes the loss, and the merged model is dense at ``weights`` and as trained."""
    text = write_text(place / "text.txt")
    config = FinetuneConfig(
        model=str(folder), data=str(text), steps=2, batch_size=2, seq_len=32, eval_tokens=64,
        output=str(place / "run"), device="cpu", warmup=0,
    )  # fmt: skip
    result = finetune(config, progress=False)
    assert result.after["loss"] != result.before["loss"]
    assert result.agreement.relative < 1e-4
    merged = load_file(place / "run" / "merged" / "model.safetensors")
    assert {t.dtype for n, t in merged.items() if n in weights} == {torch.float32}
