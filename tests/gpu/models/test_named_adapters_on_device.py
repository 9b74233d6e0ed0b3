"""Several named adapters, and bases that other libraries quantised, on the mixers' real kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    add_adapter,
    apply_prodial,
    quantize_linear,
    set_adapter,
    using_adapter,
)
from prodial_kernels.models.adapt.named_layer import PARTS
from support import mamba_ssm_loaded  # noqa: F401
from support.mixers.adapted_families import forbid_reading_the_weight
from support.models import build, randomise_adapters, token_ids, training_step

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
}
CONFIGS = {
    "both": ProdialConfig(r=8, block_size={"in_proj": 16, "out_proj": 32}),
    "out": ProdialConfig(r=16, target_modules=["out_proj"], train_diagonal=False),
}


def plain(name: str) -> nn.Module:
    return build(name, hidden_size=256, **OPTIONS[name]).bfloat16()


def by_plain_name(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    found = {}
    for name, gradient in gradients.items():
        for part, attribute in PARTS.items():
            for adapter in CONFIGS:
                name = name.replace(f".{attribute}.{adapter}.weight", f".{part}")
        found[name] = gradient
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_each_computes_as_if_it_were_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(2, 96).cuda()
    alone = {}
    for adapter, config in CONFIGS.items():
        model = plain(name)
        apply_prodial(model, config)
        randomise_adapters(model)
        alone[adapter] = training_step(model.cuda(), ids)
    model = plain(name)
    apply_prodial(model, CONFIGS["both"], "both")
    add_adapter(model, "out", CONFIGS["out"])
    for adapter in CONFIGS:
        with using_adapter(model, adapter):
            randomise_adapters(model)
    model.cuda()
    forbid_reading_the_weight(monkeypatch)
    for adapter in ("both", "out", "both", "out"):
        set_adapter(model, adapter)
        step = training_step(model, ids)
        expected = alone[adapter]
        error = (step.logits - expected.logits).norm() / expected.logits.norm()
        assert error < 1e-2, f"{adapter}: {error:.1e}"
        gradients = by_plain_name(step.gradients)
        assert gradients.keys() == expected.gradients.keys()
        for key, gradient in gradients.items():
            reference = expected.gradients[key]
            assert gradient is not None
            assert reference is not None
            assert gradient.count_nonzero(), key
            # Upstream's scans add in any order, and bf16 has 8 bits.
            off = (gradient - reference).norm() / reference.norm()
            assert off < 5e-2, f"{adapter}: {key}: {off:.1e}"


def finegrained(linear: nn.Linear) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(linear.in_features, linear.out_features, block_size=(128, 128))
    stored = quantize_linear(linear, "fp8")
    layer.weight = nn.Parameter(stored.codes, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(stored.weight_scale_inv, requires_grad=False)
    layer.bias = linear.bias
    return layer


def torchao(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.parametrize("library", [finegrained, torchao])
def test_a_base_that_another_library_quantised(library: Any) -> None:
    """As the same weights dense, through the fused path and the dequantising kernel."""
    from prodial_kernels.quantization.foreign import from_foreign

    ids = token_ids(2, 96).cuda()
    models = plain("mamba2"), plain("mamba2")
    for path, linear in list(models[0].named_modules()):
        if path.endswith(("in_proj", "out_proj")):
            stored = library(linear)
            models[0].set_submodule(path, stored)
            models[1].set_submodule(path, from_foreign(stored, torch.bfloat16).to_linear())
    steps = []
    for model in models:
        apply_prodial(model, CONFIGS["both"])
        randomise_adapters(model)
        steps.append(training_step(model.cuda(), ids))
    found, expected = steps
    assert (found.logits - expected.logits).norm() < 1e-2 * expected.logits.norm()
    for one, other in zip(found.gradients.values(), expected.gradients.values(), strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() < 5e-2 * other.norm()
