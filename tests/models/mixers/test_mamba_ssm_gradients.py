"""A step of mamba_ssm's adapted mixers against plain linears with W' as their weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prodial_kernels import ProdialConfig, apply_prodial
from support.mixers import cuda_stand_ins
from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.adapted_mamba_ssm import (
    BLOCKS,
    CONFIG,
    EVERY,
    MIXERS,
    adapted,
    assert_right,
    cast,
    fast_path_off,
    step,
    token_ids,
)
from support.mixers.mamba_ssm_stand_ins import Mamba, Model
from support.models import randomise_adapters

pytestmark = pytest.mark.usefixtures("stand_in_kernels", "weight_is_not_read")

PARTIAL = ("A_log", "D", "conv1d", "dt_proj.bias", "x_proj", "norm.weight", "dt_bias")


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_step_equals_parametrized_linears(
    mixer: type[nn.Module], bias: bool, shape: tuple[int, int]
) -> None:
    assert_right(adapted(mixer, bias=bias), token_ids(*shape))
    if mixer is Mamba:
        assert cuda_stand_ins.calls["scan_bwd"] == 2
        assert not stand_ins.fused_calls
    else:
        assert len(stand_ins.fused_calls) == 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_unfused_paths(mixer: type[nn.Module]) -> None:
    model = adapted(mixer, EVERY if mixer is Mamba else CONFIG, bias=True)
    assert_right(fast_path_off(model), token_ids())
    assert not cuda_stand_ins.calls
    assert not stand_ins.fused_calls


def test_reference_impl_leaves_autograd_to_upstream() -> None:
    config = ProdialConfig(r=3, lora_alpha=6, block_size=BLOCKS, impl="reference")
    assert_right(adapted(Mamba, config), token_ids())
    assert not cuda_stand_ins.calls


def test_x_proj_and_dt_proj_as_targets() -> None:
    assert_right(adapted(Mamba, EVERY), token_ids())
    assert cuda_stand_ins.calls["scan_bwd"] == 2


@pytest.mark.parametrize("targets", [("in_proj",), ("out_proj",), ("dt_proj",), ("x_proj",)])
def test_any_subset_of_targets(targets: tuple[str, ...]) -> None:
    assert_right(
        adapted(Mamba, ProdialConfig(r=2, target_modules=targets, diagonal="free")), token_ids()
    )


def test_every_mixer_is_adapted_where_only_some_hold_an_adapter() -> None:
    config = ProdialConfig(r=2, target_modules=r"layers\.0\.mixer\.out_proj", allow_partial=True)
    model = adapted(Mamba, config)
    assert_right(model, token_ids())
    kinds = [type(layer.mixer) is Mamba for layer in model.layers]
    assert kinds == [False, True]


@pytest.mark.parametrize("mixer", MIXERS)
def test_partial_tuning_beside_adapters(mixer: type[nn.Module]) -> None:
    model = adapted(mixer, EVERY if mixer is Mamba else CONFIG)
    for name, parameter in model.named_parameters():
        if any(part in name for part in PARTIAL) and "base_layer.weight" not in name:
            parameter.requires_grad_()
    assert_right(model, token_ids())


def test_only_what_is_asked_for_is_computed() -> None:
    """Every single tensor may be the only one that trains."""
    model = adapted(Mamba, EVERY, depth=1, bias=True)
    full = copy.deepcopy(model)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_("base_layer.weight" not in name)
    expected = step(full, token_ids())
    mixer = {
        n for n, _ in model.named_parameters() if "mixer" in n and "base_layer.weight" not in n
    }
    assert len(mixer) > 20
    for name in sorted(mixer):
        twin = copy.deepcopy(model).requires_grad_(False)
        twin.get_parameter(name).requires_grad_()
        cuda_stand_ins.calls.clear()
        logits = twin(token_ids())
        logits.backward(torch.linspace(-1, 1, logits.numel()).reshape(logits.shape))
        got = twin.get_parameter(name).grad
        torch.testing.assert_close(got, expected[name.replace("base_layer.", "")])
        assert cuda_stand_ins.calls["scan_bwd"] == ("out_proj" not in name), name
        assert cuda_stand_ins.calls["conv_bwd"] == ("in_proj" in name or "conv" in name), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_model_with_fp32_masters(mixer: type[nn.Module]) -> None:
    """As one is trained, cast first: what begins in fp64, as above, keeps its masters so."""
    model = cast(Model(mixer, depth=1, width=32), torch.bfloat16)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    assert_right(model, token_ids(2, 33))
    adapter = {name: p for name, p in model.named_parameters() if "prodial_" in name}
    assert len(adapter) == 2 * 4
    for name, parameter in adapter.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    assert model.layers[0].mixer.in_proj.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [CONFIG.target_modules, EVERY.target_modules], ids=len)
def test_triton_projectors(targets: tuple[str, ...]) -> None:
    """The kernels inside the block, on the CPU under the interpreter."""
    config = ProdialConfig(
        r=3, lora_alpha=6, target_modules=targets, diagonal="free", impl="triton"
    )
    model = cast(adapted(Mamba, config, depth=1, width=32), torch.float16)
    assert_right(model, token_ids(2, 33))
    model.layers[0].mixer.prodial_recompute_xz = True
    assert_right(model, token_ids(2, 33))


@pytest.mark.parametrize("mixer", MIXERS)
def test_dropout_is_the_same_in_forward_and_backward(mixer: type[nn.Module]) -> None:
    """With the mask fixed the block is smooth: its gradient is the slope along any direction."""
    config = ProdialConfig(r=3, lora_alpha=6, lora_dropout=0.5, block_size=BLOCKS)
    model = adapted(mixer, config, depth=1)
    weights = torch.randn(2, 7, 11, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return (model(token_ids()) * weights).sum()

    value = loss()
    value.backward()
    assert not torch.equal(value, (model.eval()(token_ids()) * weights).sum())
    model.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            direction = torch.randn_like(parameter)
            slope = (parameter.grad * direction).sum()
            with torch.no_grad():
                parameter.add_(1e-5 * direction)
                above = loss()
                parameter.sub_(2e-5 * direction)
                below = loss()
                parameter.add_(1e-5 * direction)
            torch.testing.assert_close((above - below) / 2e-5, slope, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing(mixer: type[nn.Module], use_reentrant: bool) -> None:
    block = adapted(mixer, depth=1).layers[0].mixer
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for wrap in (False, True):
        block.zero_grad()
        x.grad = None
        y = checkpoint(block, x, use_reentrant=use_reentrant) if wrap else block(x)
        y.sum().backward()
        adapters = [p.grad.clone() for p in block.parameters() if p.requires_grad]
        results.append([y, x.grad.clone(), *adapters])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast(mixer: type[nn.Module]) -> None:
    model = adapted(mixer, EVERY if mixer is Mamba else CONFIG).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(token_ids())
    logits.float().sum().backward()
    expected = model(token_ids())
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.3)
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype
