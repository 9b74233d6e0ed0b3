"""Layers that transformers loaded with bitsandbytes: read exactly, or refused with the way out.

Stand-ins with the library's names and state; the library itself is in ``tests/gpu``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from prodial_kernels import QuantizedLinear, quantize_linear
from prodial_kernels.quantization.foreign.bitsandbytes import from_bitsandbytes, is_bitsandbytes
from support.models import build, token_ids
from support.peft_models import adapted, config, layers, logits, move

IDS = token_ids()


class Linear4bit(nn.Linear):
    """Holds and writes what bitsandbytes' does, and casts its inputs as that does."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.stored = (quantize_linear(linear, "nf4"),)
        self.bias = linear.bias
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(self.stored[0].codes, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(quant_type="nf4")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.stored[0]._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        weight = self.stored[0].dequantize(dtype=dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)


class Linear8bitLt(nn.Linear):
    pass


for cls in (Linear4bit, Linear8bitLt):
    cls.__module__ = "bitsandbytes.nn.modules"


class Quantization(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def quantized(name: str = "bamba", **options: Any) -> nn.Module:
    """A tiny model whose projectors are as transformers loads them in 4 bits."""
    model = build(name)
    for module in list(model.modules()):
        for child in ("in_proj", "out_proj"):
            if hasattr(module, child):
                setattr(module, child, Linear4bit(getattr(module, child), **options))
    return model


def test_the_adapted_model_computes_on_the_stored_weights() -> None:
    model = quantized()
    linear = model.model.layers[0].mamba.in_proj
    stored, codes = linear.stored[0], linear.weight
    x = torch.randn(3, 16)
    expected = linear(x)
    model = get_peft_model(model, config())
    layer = layers(model)[0]
    assert isinstance(layer.base_layer, QuantizedLinear)
    assert torch.equal(layer(x), expected)
    assert layer.base_layer.codes.data_ptr() == codes.data_ptr() == stored.codes.data_ptr()

    move(model, "default")
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == 4 * len(layers(model))


def test_unload_gives_the_very_layers_back_and_merging_dense_ones() -> None:
    plain = quantized()
    before = {path: module for path, module in plain.named_modules() if is_bitsandbytes(module)}
    assert len(before) >= 4
    model = get_peft_model(plain, config())
    back = model.unload()
    assert all(back.get_submodule(path) is module for path, module in before.items())

    model = get_peft_model(back, config())
    move(model, "default")
    expected = logits(model, IDS)
    back.config.quantization_config = Quantization(llm_int8_skip_modules=None)
    merged = model.merge_and_unload()
    assert {type(merged.get_submodule(path)) for path in before} == {nn.Linear}
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-5)
    # What is saved with the model says that they are dense.
    skipped = merged.config.quantization_config.llm_int8_skip_modules
    assert {*before, "lm_head"} <= set(skipped)


def test_it_takes_inputs_in_any_dtype_as_the_library_does() -> None:
    linear = Linear4bit(nn.Linear(64, 8), torch.bfloat16)
    x = torch.randn(3, 64)
    expected = linear(x)
    model = get_peft_model(nn.ModuleDict({"in_proj": linear}), config(n_blocks=4))
    (layer,) = layers(model)
    assert layer.base_layer.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    merged = get_peft_model(quantized(compute_dtype=torch.bfloat16), config()).merge_and_unload()
    assert merged(input_ids=IDS).logits.dtype == torch.float32
    # A dense layer takes no other dtype than its own.
    dense = layers(adapted("mamba2").to(torch.bfloat16))[0]
    with pytest.raises(TypeError, match="same dtype"):
        dense(torch.randn(3, 16))


def broken(**changes: Any) -> Linear4bit:
    linear = Linear4bit(nn.Linear(64, 8))
    linear.weight.quant_state = SimpleNamespace(**{"quant_type": "nf4", **changes})
    return linear


REFUSED = {
    "FP4": (broken(quant_type="fp4"), "in fp4, of which 4-bit formats only NF4 is read"),
    "before its device": (broken(quant_type=None), "not quantised yet"),
    "repacked": (broken(packing_format_for_cpu=True), "evaluated on this CPU"),
    "8 bits": (Linear8bitLt(64, 8), "quantises its inputs too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_exactly_is_refused(case: str) -> None:
    linear, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(linear)
    model = nn.ModuleDict({"in_proj": linear})
    with pytest.raises(ValueError, match=rf"in_proj cannot be adapted: .*{message}"):
        get_peft_model(model, config(n_blocks=None))
    assert model["in_proj"] is linear


def test_other_formats_are_refused() -> None:
    class Int8Weight(nn.Parameter):
        pass

    linear = nn.Linear(8, 8)
    linear.weight = Int8Weight(linear.weight.data)
    with pytest.raises(ValueError, match="cannot be adapted"):
        get_peft_model(nn.ModuleDict({"in_proj": linear}), config(n_blocks=None))
