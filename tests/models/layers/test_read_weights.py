"""A quantised layer whose weight a mixer reads: Mamba's dt_proj, as bitsandbytes stores it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    QuantizedLinear,
    apply_prodial,
    merge_prodial,
    quantize_linear,
    remove_prodial,
)
from support.models import build, randomise_adapters, token_ids

CONFIG = ProdialConfig(r=2, n_blocks=2)


class Linear4bit(nn.Linear):
    """Holds and writes what bitsandbytes' does; its weight is codes, which nobody can multiply."""

    def __init__(self, linear: nn.Linear, kind: str = "nf4") -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.stored = (quantize_linear(linear, "nf4"),)
        self.bias = linear.bias
        self.weight = nn.Parameter(self.stored[0].codes, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(quant_type=kind)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.stored[0]._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stored[0](x)


Linear4bit.__module__ = "bitsandbytes.nn.modules"
NAMES = ("in_proj", "x_proj", "dt_proj", "out_proj")


def stored(make: Any) -> nn.Module:
    """A tiny Mamba whose four projections are made anew by ``make``."""
    model = build("mamba")
    for layer in model.backbone.layers:
        for name in NAMES:
            setattr(layer.mixer, name, make(getattr(layer.mixer, name)))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(token_ids(), use_cache=False).logits


def test_upstream_reads_the_codes() -> None:
    """When this passes, transformers calls dt_proj, and nothing has to be replaced."""
    with pytest.raises(RuntimeError, match=r"[Bb]yte|size|dtype|shape"):
        logits(stored(Linear4bit))


def test_the_weight_is_what_the_codes_stand_for() -> None:
    expected = logits(stored(lambda linear: quantize_linear(linear, "nf4")))
    model = stored(Linear4bit)
    before = [layer.mixer.dt_proj for layer in model.backbone.layers]
    apply_prodial(model, CONFIG)
    torch.testing.assert_close(logits(model), expected)
    assert isinstance(model.backbone.layers[0].mixer.dt_proj, QuantizedLinear)

    randomise_adapters(model)
    output = model.train()(token_ids(), labels=token_ids(), use_cache=False)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    remove_prodial(model)
    assert [layer.mixer.dt_proj for layer in model.backbone.layers] == before


def test_a_merged_model_has_dense_weights() -> None:
    model = stored(Linear4bit)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    expected = logits(model)
    merge_prodial(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert type(model.backbone.layers[0].mixer.dt_proj) is nn.Linear


def test_what_cannot_be_read_exactly_is_named() -> None:
    model = stored(lambda linear: linear)
    model.backbone.layers[1].mixer.dt_proj = Linear4bit(nn.Linear(16, 32), "fp4")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mixer\.dt_proj, whose weight MambaMixer read"
    ):
        apply_prodial(model, CONFIG)
    assert type(model.backbone.layers[0].mixer.in_proj) is nn.Linear


def test_bitsandbytes_itself(tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("mamba").save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits)
    apply_prodial(model, CONFIG)
    assert logits(model.eval()).isfinite().all()
