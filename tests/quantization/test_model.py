"""Quantising a model in place: which layers, what is reported, what memory holds, refusals."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, quantize_linear, quantize_model
from prodial_kernels.quantization import FORMATS, QuantizedLinear
from prodial_kernels.quantization import model as quantization_model


class Mixer(nn.Module):
    def __init__(self, out_proj: nn.Linear) -> None:
        super().__init__()
        self.in_proj = nn.Linear(64, 96, bias=False)
        self.out_proj = out_proj

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(self.in_proj(x).relu())


class Model(nn.Module):
    """Two mixers that share their ``out_proj``, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 64)
        shared = nn.Linear(96, 64)
        self.layers = nn.ModuleList([Mixer(shared), Mixer(shared)])
        self.head = nn.Linear(64, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("format", FORMATS)
def test_the_targets_and_nothing_else(format: str) -> None:
    model, ids = Model(), torch.tensor([[1, 2, 3]])
    expected = {name: quantize_linear(model.get_submodule(name), format) for name in
                ("layers.0.in_proj", "layers.0.out_proj", "layers.1.in_proj")}  # fmt: skip
    dense = model(ids)
    report = quantize_model(model, format)
    assert report.errors.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(model.get_submodule(name).dequantize(), layer.dequantize())
    assert model.layers[1].out_proj is model.layers[0].out_proj
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 3
    assert type(model.head) is nn.Linear
    assert report.bytes_before == 3 * 4 * 64 * 96
    assert report.bytes_after == sum(layer.packed_bytes for layer in expected.values())
    assert all(0 < error.relative_rms < 0.1 for error in report.errors.values())
    assert f"3 layers in {format}" in str(report)
    difference = (model(ids) - dense).norm() / dense.norm()
    assert 0 < float(difference.detach()) < 0.1
    apply_prodial(model, ProdialConfig(r=2))
    model(ids).sum().backward()


def test_dense_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    weights = [weakref.ref(m.weight) for m in model.modules() if type(m) is nn.Linear][:-1]
    alive = []

    def counting(linear: nn.Linear, format: str) -> QuantizedLinear:
        alive.append(sum(ref() is not None for ref in weights))
        return quantize_linear(linear, format)

    monkeypatch.setattr(quantization_model, "quantize_linear", counting)
    quantize_model(model, "nf4")
    assert alive == [3, 2, 1]
    assert not any(ref() is not None for ref in weights)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = Model()
    modules = list(model.modules())
    with pytest.raises(ValueError, match="format must be one of"):
        quantize_model(model, "int4")
    with pytest.raises(ValueError, match="'x_proj' matches no module"):
        quantize_model(model, "nf4", target_modules=("in_proj", "x_proj"))
    with pytest.raises(ValueError, match="head shares its weight with a Embedding"):
        quantize_model(model, "nf4", target_modules=("in_proj", "head"))
    with pytest.raises(TypeError, match=r"embedding is a torch.nn.*\.Embedding; only a plain"):
        quantize_model(model, "nf4", target_modules=("in_proj", "embedding"))
    hook = model.layers[1].in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.in_proj has hooks"):
        quantize_model(model, "nf4")
    hook.remove()
    assert list(model.modules()) == modules
    with torch.no_grad():
        model.layers[1].in_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.in_proj: .*not finite"):
        quantize_model(model, "nf4")
    with pytest.raises(TypeError, match="NF4Linear; only a plain"):
        quantize_model(model, "nf4")
    adapted = Model()
    apply_prodial(adapted, ProdialConfig(r=2))
    with pytest.raises(TypeError, match=r"ProdialLinear; only a plain.*before apply_prodial"):
        quantize_model(adapted, "nf4")
