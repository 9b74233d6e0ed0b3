"""A model with quantised layers is saved dense: codes are never written as weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.training.random_weights import RandomWeights
from prodial_kernels import quantize_model
from prodial_kernels.quantization import FORMATS, load_quantized
from support.models import build, token_ids


@pytest.mark.parametrize("format", FORMATS)
def test_from_pretrained_gives_what_was_computed(format: str, tmp_path: Path) -> None:
    model = build("mamba2").eval()
    quantize_model(model, format)
    with torch.no_grad():
        expected = model(token_ids()).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(token_ids()).logits, expected)


def test_models_that_were_read_quantised(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build("mamba2").eval()
    load_quantized(model, RandomWeights(model, device="cpu"), "nf4", device="cpu")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)
