"""Models on quantised layers: adapters applied, merged, removed, saved, resumed, trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.quantization import FORMATS, QuantizedLinear, quantize_linear
from support.models import build, randomise_adapters, token_ids, training_step

CONFIG = ProdialConfig(r=4, n_blocks={"in_proj": 4, "out_proj": 8})


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(24, 96, bias=False)
        self.out_proj = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(value * torch.sigmoid(gate))


def quantise_all(model: nn.Module, format: str, names: tuple[str, ...]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names:
                setattr(module, name, quantize_linear(child, format))
    return model


def densify(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, child.to_linear())
    return model


def small_model(format: str = "nf4", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return quantise_all(nn.Sequential(Mixer(), Mixer()), format, ("in_proj", "out_proj"))


@pytest.mark.parametrize("format", FORMATS)
def test_apply_merge_remove(format: str) -> None:
    model = small_model(format)
    x = torch.randn(2, 5, 24)
    before = model(x)
    bases = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    report = apply_prodial(model, CONFIG)
    dense_report = apply_prodial(densify(small_model(format)), CONFIG)
    assert report == dense_report
    torch.testing.assert_close(model(x), before)
    randomise_adapters(model)
    trained = model(x)
    merged = merge_prodial(copy.deepcopy(model))
    assert not any(isinstance(m, QuantizedLinear | ProdialLinear) for m in merged.modules())
    torch.testing.assert_close(merged(x), trained)
    remove_prodial(model)
    assert [m for m in model.modules() if isinstance(m, QuantizedLinear)] == bases
    assert torch.equal(model(x), before)


def test_targets_that_cannot_be_adapted() -> None:
    model = small_model()
    model[1].in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'1\.in_proj'.*with hooks"):
        apply_prodial(model, CONFIG)
    model = small_model()
    model[0].in_proj = model[0].in_proj.to_linear()
    apply_prodial(model, CONFIG)  # some layers quantised, some not
    assert isinstance(model[0].in_proj.base_layer, nn.Linear)
    assert isinstance(model[1].in_proj.base_layer, QuantizedLinear)


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_are_saved_and_resumed(format: str, tmp_path: Path) -> None:
    model = small_model(format)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    save_adapter(model, tmp_path)
    x = torch.randn(2, 5, 24)
    resumed = small_model(format)
    load_adapter(resumed, tmp_path)
    assert torch.equal(resumed(x), model(x))
    # On the same weights in full, or in another format, it is another base: said, not ignored.
    torch.manual_seed(0)
    with pytest.raises(AdapterError, match=rf"other weights .* stored as {format}, and here it"):
        load_adapter(nn.Sequential(Mixer(), Mixer()), tmp_path)
    # On what the format stands for it is the same base.
    load_adapter(densify(small_model(format)), tmp_path)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_models_of_transformers_train_on_quantised_projectors(family: str) -> None:
    """Every path that a family takes gives what it gives on the dequantised weights."""
    names = ("in_proj", "out_proj", "x_proj", "dt_proj")
    config = ProdialConfig(r=2, target_modules=("in_proj", "out_proj"))
    steps = []
    for change in (lambda model: model, densify):
        model = change(quantise_all(build(family), "nf4", names))
        apply_prodial(model, config)
        randomise_adapters(model)
        steps.append(training_step(model, token_ids()))
    ours, theirs = steps
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert gradient is not None, name
        assert gradient.count_nonzero(), name
        torch.testing.assert_close(gradient, theirs.gradients[name])
