"""What is trained beside an adapter is saved with it and put back, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial, load_adapter, save_adapter
from prodial_kernels.checkpoint import read_adapter
from support.saved_adapters import CONFIG, Mixer, Model, expect_refusal, state, trained

PLAIN = ProdialConfig(r=2)


class Normed(Model):
    """With parameters and running statistics that nothing names."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(12))
        self.between = nn.BatchNorm1d(12)
        self.tied = self.gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.between(x) * self.gain)


def moved(model: nn.Module, *names: str) -> nn.Module:
    """Train ``names`` beside the adapter by hand, and everything that requires a gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            parameter.requires_grad_()
    model.train()(torch.randn(8, 12)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    "names",
    [("gain",), ("out_proj.base_layer.bias",), ("head.0.weight", "head.0.bias"), ("between.bias",)],
)
def test_parameters_that_the_user_thawed(names: tuple[str, ...], tmp_path: Path) -> None:
    model = Normed()
    apply_prodial(model, PLAIN)
    moved(model, *names)
    save_adapter(model, tmp_path)
    again = Normed()
    report = load_adapter(again, tmp_path)
    assert state(again) == state(model)
    x = torch.randn(3, 12)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # And into the model that trains the same.
    load_adapter(again, tmp_path)
    # They go by the names that the plain model has.
    plain = {name.replace(".base_layer", "") for name in names}
    for name in read_adapter(tmp_path).tensors:
        if "prodial_" not in name and "running" not in name and "num_batches" not in name:
            assert name.endswith(tuple(plain))


def test_running_statistics_are_saved_though_frozen(tmp_path: Path) -> None:
    model = Normed()
    apply_prodial(model, PLAIN)
    moved(model)
    assert not torch.equal(model.between.running_mean, torch.zeros(12))
    save_adapter(model, tmp_path)
    again = Normed()
    load_adapter(again, tmp_path)
    assert torch.equal(again.between.running_mean, model.between.running_mean)
    assert torch.equal(again.between.num_batches_tracked, model.between.num_batches_tracked)
    x = torch.randn(3, 12)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["gain", "out_proj.bias", "between.weight"])
def test_modules_to_save_may_name_parameters(name: str, tmp_path: Path) -> None:
    config = ProdialConfig(r=2, modules_to_save=(name,))
    model = Normed()
    apply_prodial(model, config)
    assert any(n.endswith(name.rpartition(".")[2]) and p.requires_grad
               for n, p in model.named_parameters())  # fmt: skip
    moved(model)
    save_adapter(model, tmp_path)
    again = Normed()
    load_adapter(again, tmp_path)
    assert state(again) == state(model)


def test_a_target_is_not_trained_as_it_is_too() -> None:
    model = Normed()
    with pytest.raises(ValueError, match=r"modules_to_save='in_proj\.weight' .* is also a target"):
        apply_prodial(model, ProdialConfig(r=2, modules_to_save=("in_proj.weight",)))
    with pytest.raises(ValueError, match=r"matches no module .* and no such parameter"):
        apply_prodial(model, ProdialConfig(r=2, modules_to_save=("gian",)))


def test_what_the_file_does_not_hold_is_named(tmp_path: Path) -> None:
    model = Normed()
    apply_prodial(model, PLAIN)
    save_adapter(model, tmp_path)
    other = Normed()
    apply_prodial(other, PLAIN)
    moved(other, "gain")
    expect_refusal(tmp_path, r"missing \['gain'\]", other)


def test_what_the_model_has_not_is_named(tmp_path: Path) -> None:
    model = Normed()
    apply_prodial(model, PLAIN)
    save_adapter(moved(model, "gain"), tmp_path)
    expect_refusal(tmp_path, r"not in the model \['between\..*'gain'\]", Model())


def test_more_layers_or_other_parts_of_the_base_are_refused(directory: Path) -> None:
    model = Model()
    model.extra = nn.Linear(2, 2)
    expect_refusal(
        directory, r"of other tensors: .* lacks none and has extra\.bias, extra\.w", model
    )
    bigger = Model()
    bigger.layers.append(Mixer())
    expect_refusal(directory, "has nothing for", bigger)


def test_a_refused_load_draws_nothing(directory: Path) -> None:
    before = torch.get_rng_state()
    model = Model()
    with torch.no_grad():
        model.layers[0].in_proj.weight[0, 0] += 1
    torch.set_rng_state(before)
    expect_refusal(directory, "other weights", model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_diverged_are_not_saved(value: float, tmp_path: Path) -> None:
    for name in ("layers.1.out_proj.prodial_b", "head.0.bias"):
        model = trained(CONFIG)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(ValueError, match=rf"cannot be saved: {name} holds NaN or inf"):
            save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
