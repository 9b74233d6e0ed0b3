"""Every mixer's fused path follows the active adapter, after each switch: no dead adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    adapter_disabled,
    add_adapter,
    apply_prodial,
    delete_adapter,
    set_adapter,
    using_adapter,
)
from prodial_kernels.models.adapt.named_layer import PARTS
from prodial_kernels.models.mixers.hf import FUSED_SSD
from support.mixers import mamba_ssm_stand_ins, vim_stand_in
from support.mixers.adapted_families import (
    forbid_reading_the_weight,
    install_mamba_ssm,
    install_stand_in,
)
from support.mixers.adapted_mamba_ssm import MIXERS
from support.mixers.mamba_ssm_stand_ins import Model
from support.models import FAMILIES, FUSED_FAMILIES, build, randomise_adapters, token_ids

BOTH = ProdialConfig(r=3, lora_alpha=6, block_size={"in_proj": 4, "out_proj": 2})
CONFIGS = {
    "both": BOTH,
    # Where the fused path takes out_proj out of the fused function, and where it need not.
    "in": ProdialConfig(r=2, target_modules=["in_proj"], diagonal="free"),
    "out": ProdialConfig(r=1, target_modules=["out_proj"], train_diagonal=False),
    "slow": ProdialConfig(r=2, impl="reference"),
}
ORDER = ("both", "out", "slow", "in", "both", "slow", "out", "in")

Steps = Callable[[nn.Module], Tensor]


def gradients(model: nn.Module, run: Steps) -> dict[str, Tensor]:
    """The output and the gradients by the names of a single adapter's tensors."""
    model.zero_grad(set_to_none=True)
    output = run(model)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    found = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, f"{name} is frozen and has a gradient"
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.count_nonzero(), f"{name} has a zero gradient"
        for part, attribute in PARTS.items():
            for adapter in CONFIGS:
                name = name.replace(f".{attribute}.{adapter}.weight", f".{part}")
        found[name] = parameter.grad
    return found


def check_switching(make: Callable[[], nn.Module], run: Steps) -> None:
    alone = {}
    for name, config in CONFIGS.items():
        model = make()
        apply_prodial(model, config)
        randomise_adapters(model)
        alone[name] = gradients(model, run)
    base = run(make()).detach()

    model = make()
    for name, config in CONFIGS.items():
        if name == "both":
            apply_prodial(model, config, name)
        else:
            add_adapter(model, name, config)
        with using_adapter(model, name):
            randomise_adapters(model)
    for name in ORDER:
        set_adapter(model, name)
        found = gradients(model, run)
        assert found.keys() == alone[name].keys()
        for key, value in found.items():
            # Not to the bit: a projector without an adapter is called where others are fused.
            error = (value - alone[name][key]).norm() / alone[name][key].norm()
            assert error < 1e-5, f"{name}: {key}: {error:.1e}"
        with adapter_disabled(model), torch.no_grad():
            torch.testing.assert_close(run(model), base, rtol=1e-4, atol=1e-5)
    # Where out_proj is no longer adapted at all, the mixers have upstream's path again.
    set_adapter(model, "in")
    for name in ("both", "out", "slow"):
        delete_adapter(model, name)
    for key, value in gradients(model, run).items():
        torch.testing.assert_close(value, alone["in"][key], rtol=1e-4, atol=1e-5)


def run_ids(model: nn.Module) -> Tensor:
    return model.train()(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_stand_in(monkeypatch, name)
    forbid_reading_the_weight(monkeypatch)
    check_switching(lambda: build(name), run_ids)
    assert calls


@pytest.mark.parametrize("name", ["mamba2"])
def test_transformers_on_mamba_ssms_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FAMILIES[name].fused == FUSED_SSD
    calls = install_mamba_ssm(monkeypatch, name)
    forbid_reading_the_weight(monkeypatch)
    check_switching(lambda: build(name), run_ids)
    assert calls


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.usefixtures("stand_in_kernels", "weight_is_not_read")
def test_mamba_ssm(mixer: type[nn.Module]) -> None:
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(1))
    check_switching(lambda: Model(mixer), lambda model: model.train()(ids))


@pytest.mark.usefixtures("weight_is_not_read")
def test_vision() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(8), vim_stand_in.Mamba(8))

    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    check_switching(make, lambda model: model(x))


def test_graphs_of_decoding_are_dropped_at_every_switch() -> None:
    """``generate(cg=True)`` replays a graph that reads the tensors of then."""
    model = Model(mamba_ssm_stand_ins.Mamba2)
    apply_prodial(model, ProdialConfig(r=2), "a")
    add_adapter(model, "b", ProdialConfig(r=3))

    def captured() -> bool:
        dropped = model._decoding_cache is None
        model._decoding_cache = object()
        return not dropped

    model._decoding_cache = object()
    set_adapter(model, "b")
    assert not captured()
    with adapter_disabled(model):
        assert not captured()
    assert not captured()
    delete_adapter(model, "a")
    assert not captured()
    assert captured()
