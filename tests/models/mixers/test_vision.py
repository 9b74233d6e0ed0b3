"""Adapters in the mixers of Vim and MambaVision: both directions, no weight read, all undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from prodial_kernels.models.mixers.vim import recognises
from support.mixers import vim_stand_in
from support.mixers.adapted_families import EffectiveWeight, forbid_reading_the_weight
from support.models import randomise_adapters

CONFIG = ProdialConfig(r=3, lora_alpha=6, block_size=2)
TOKENS, WIDTH = 7, 6

KINDS = [
    {},
    {"if_divide_out": False},
    {"init_layer_scale": 0.3, "bias": True},
    {"bimamba_type": "none"},
    {"bimamba_type": "none", "use_fast_path": False},
]


def build(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(WIDTH), vim_stand_in.Mamba(WIDTH, **options))


def adapt(model: nn.Module, config: ProdialConfig = CONFIG) -> nn.Module:
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


def hidden_states() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output, gradient of the input and of every trained parameter."""
    x = hidden_states().to(dtype).requires_grad_()
    output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.count_nonzero() for g in gradients.values())
    return {"output": output.detach(), "input": x.grad, **gradients}


def oracle(plain: nn.Module, adapted: nn.Module) -> dict[str, Tensor]:
    """:func:`step` on upstream's own forward, whose weights are W' written out densely."""
    plain.requires_grad_(False)
    for path, layer in adapted.named_modules():
        if isinstance(layer, ProdialLinear):
            effective = EffectiveWeight(layer)
            parametrize.register_parametrization(plain.get_submodule(path), "weight", effective)
    results = step(plain.double(), torch.float64)
    return {n.replace("parametrizations.weight.0.", ""): t for n, t in results.items()}


def assert_equals_oracle(plain: Callable[[], nn.Module]) -> None:
    """In fp64, where which of two orders of summing errs more is no matter of luck; then in fp32.

    What is left in fp64 are the parts that upstream computes in fp32 whatever its input is.
    """
    for dtype, rtol, atol in ((torch.float64, 1e-7, 1e-9), (torch.float32, 1e-4, 1e-6)):
        model = adapt(plain().to(dtype))
        found, expected = step(model, dtype), oracle(plain(), model)
        assert len(found) == 2 + 2 * 4
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_vim_equals_parametrized_linears(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_reading_the_weight(monkeypatch)
    assert_equals_oracle(lambda: build(**options))
    model = adapt(build(**options))
    output = model(hidden_states())
    torch.testing.assert_close(model.eval()(hidden_states()), output)


def test_both_directions_are_there() -> None:
    """Every token's output depends on every other token."""
    x = hidden_states().requires_grad_()
    adapt(build())(x)[:, TOKENS // 2].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_merge_and_remove_give_upstreams_mixer_back(options: dict[str, Any]) -> None:
    plain = build(**options)
    expected = plain(hidden_states())
    model = adapt(copy.deepcopy(plain))
    adapted = model(hidden_states())
    assert not torch.allclose(adapted, expected)
    assert type(model[1]) is not vim_stand_in.Mamba
    assert isinstance(model[1], vim_stand_in.Mamba)
    merged = merge_prodial(pickle.loads(pickle.dumps(model)))
    torch.testing.assert_close(merged(hidden_states()), adapted, rtol=1e-4, atol=1e-5)
    remove_prodial(model)
    assert torch.equal(model(hidden_states()), expected)
    assert type(model[1]) is type(merged[1]) is vim_stand_in.Mamba


def test_dropout_trains() -> None:
    model = adapt(build(), ProdialConfig(r=3, lora_dropout=0.5))
    first = step(model)["output"]
    assert not torch.equal(step(model)["output"], first)


def test_inner_projections_can_be_adapted_too() -> None:
    names = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
    model = adapt(build(), ProdialConfig(r=3, lora_alpha=6, target_modules=names))
    result = step(model)
    assert len(result) == 2 + 6 * 4
    exact = oracle(build(), model)
    for name, tensor in result.items():
        # The step size's gradients are small sums of large terms.
        error = (tensor - exact[name]).norm() / exact[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bimamba_type": "v1"}, r"bimamba_type='v1' cannot be adapted: only \['none', 'v2'\]"),
        ({"use_fast_path": False}, "scans forwards only; set use_fast_path=True"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = build(**options)
    with pytest.raises(ValueError, match=message):
        apply_prodial(model, CONFIG)
    assert type(model[1].in_proj) is nn.Linear


def test_generation_is_refused_where_it_is_impossible() -> None:
    mixer = adapt(build())[1]
    with pytest.raises(ValueError, match="needs the whole sequence; pass inference_params=None"):
        mixer(hidden_states(), inference_params=object())
    mixer = adapt(build(bimamba_type="none"))[1]
    expected = mixer(hidden_states())
    torch.testing.assert_close(mixer(hidden_states(), inference_params=object()), expected)


def test_only_vims_mixer_is_recognised() -> None:
    assert recognises(build()[1])
    assert not recognises(build()[0])
    assert not recognises(vim_stand_in.MambaVisionMixer(WIDTH))


def test_mambavision_is_left_as_it_is() -> None:
    def mambavision() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(WIDTH), vim_stand_in.MambaVisionMixer(WIDTH))

    model = adapt(mambavision())
    assert type(model[1]) is vim_stand_in.MambaVisionMixer
    assert_equals_oracle(mambavision)
