"""Weight decay pulls towards the pretrained model, and touches nothing twice or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from prodial_kernels.training.step.optimizers import adapter_parameter_groups
from support.models import build


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 12)
        self.out_proj = nn.Linear(12, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.out_proj(self.in_proj(x))))


@pytest.fixture
def model() -> Model:
    model = Model()
    config = ProdialConfig(r=2, n_blocks={"in_proj": 3}, modules_to_save=("norm", "head"))
    apply_prodial(model, config)
    return model


def test_every_trained_parameter_once(model: Model) -> None:
    decayed, kept = adapter_parameter_groups(model, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == [
        *(
            f"{layer}_proj.prodial_{part}"
            for layer in ("in", "out")
            for part in ("blocks", "a", "b")
        ),
        "head.weight",
    ]
    assert [names[id(p)] for p in kept["params"]] == [
        "in_proj.prodial_scale", "out_proj.prodial_scale", "norm.weight", "norm.bias", "head.bias",
    ]  # fmt: skip
    assert len(decayed["params"]) + len(kept["params"]) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_decay_alone_leads_back_to_the_pretrained_model(
    model: Model, optimizer: type[torch.optim.Optimizer]
) -> None:
    x = torch.randn(5, 6)
    pretrained = model.out_proj.base_layer(model.in_proj.base_layer(x))
    layers = [layer for layer in model.modules() if isinstance(layer, ProdialLinear)]
    with torch.no_grad():
        for layer in layers:
            layer.prodial_blocks.normal_()
            layer.prodial_b.normal_()
    assert not torch.allclose(model.out_proj(model.in_proj(x)), pretrained, atol=0.1)
    optimiser = optimizer(adapter_parameter_groups(model, weight_decay=0.5), lr=0.1)
    for _ in range(1000):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimiser.step()
    for layer in layers:
        assert torch.equal(layer.prodial_scale, torch.zeros_like(layer.prodial_scale))
        for part in (layer.prodial_blocks, layer.prodial_a, layer.prodial_b):
            assert part.abs().max() < 1e-12
    assert torch.equal(model.norm.weight, torch.ones(6))
    torch.testing.assert_close(model.out_proj(model.in_proj(x)), pretrained)


def test_without_decayed_or_kept_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    options = {"target_modules": ("0",), "train_diagonal": False}
    apply_prodial(model, ProdialConfig(r=0, **options))
    (group,) = adapter_parameter_groups(model, weight_decay=0.1)
    assert group == {"params": [model[0].prodial_scale], "weight_decay": 0.0}


def test_errors(model: Model) -> None:
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        adapter_parameter_groups(model, weight_decay=-1)
    with pytest.raises(ValueError, match=r"no trainable parameter; call apply_prodial"):
        adapter_parameter_groups(Model().requires_grad_(False), weight_decay=0.1)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "zamba", "falcon_mamba", "jamba"])
def test_dynamics_and_biases_are_never_decayed(family: str) -> None:
    model = build(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = adapter_parameter_groups(model, weight_decay=0.1)
    wrong = ("A_log", "D", "bias")
    assert not [n for p in decayed["params"] if (n := names[id(p)]).endswith(wrong)]
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    if family in ("mamba", "zamba"):
        # Not because they are vectors.
        assert [p for p in kept["params"] if p.ndim >= 2 and names[id(p)].endswith("A_log")]


def test_a_parameter_can_be_marked() -> None:
    model = nn.Module()
    model.free, model.marked = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    model.marked._no_weight_decay = True
    decayed, kept = adapter_parameter_groups(model, weight_decay=0.1)
    assert decayed["params"] == [model.free]
    assert kept["params"] == [model.marked]
