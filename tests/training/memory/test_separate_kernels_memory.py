"""FalconMamba's blocks run on separate kernels: what these keep and take, against the plan.

The kernels are stood in for by functions that make and keep the tensors that theirs do, of zeros.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, NORM, apply_levels
from prodial_kernels.training.memory.activations import kept, workspace
from prodial_kernels.training.memory.part_bytes import Tokens
from prodial_kernels.training.memory.shapes import describe_model
from support.kernels import rms_norm_kernel
from support.live_storages import LiveStorages

WIDTH, STATE, RANK = 64, 16, 16


class _Watch:
    """The bytes alive at the end of the scan's backward, when everything of it is there."""

    live: LiveStorages
    without: list[Tensor]
    seen: int = 0


class _Scan(torch.autograd.Function):
    """``mamba_ssm``'s ``selective_scan_fn``."""

    @staticmethod
    def forward(ctx: Any, watch: _Watch, *inputs: Tensor) -> Tensor:
        u, delta, A, B, C, D, z, bias = inputs
        u, delta, B, C, z = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (u, delta, B, C, z)
        )
        states = torch.zeros(*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, torch.zeros_like(u))
        ctx.watch = watch
        return torch.zeros_like(u)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, _, B, C, _, z, *_ = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        du, ddelta, dz = (torch.zeros_like(t) for t in (u, delta, z))
        dB, dC = torch.zeros(B.shape), torch.zeros(C.shape)
        ctx.watch.seen = ctx.watch.live.bytes(without=ctx.watch.without)
        return None, du, ddelta, None, dB.to(B), dC.to(C), None, dz, None


class _Convolution(torch.autograd.Function):
    """``causal_conv1d_fn``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), None, None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> _Watch:
    from transformers.models.falcon_mamba import modeling_falcon_mamba as modeling

    watch = _Watch()

    def scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor,
        delta_bias: Tensor, **_: Any,
    ) -> Any:  # fmt: skip
        return _Scan.apply(watch, u, dt, A, B, C, D, z, delta_bias)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Any:
        return _Convolution.apply(x, weight, bias)

    monkeypatch.setattr(modeling, "mamba_selective_scan", scan)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", convolve)
    return watch


def falcon() -> Any:
    import transformers

    config = transformers.FalconMambaConfig(
        hidden_size=WIDTH, num_hidden_layers=2, vocab_size=64, state_size=STATE
    )
    model: Any = transformers.FalconMambaForCausalLM(config).bfloat16()
    apply_prodial(model, ProdialConfig(r=RANK))
    return model.train()


@pytest.mark.parametrize("norms", ["eager", "fused"])
@pytest.mark.parametrize("level", [KEEP, NORM, CHECKPOINT])
def test_separate_kernels_take_what_the_plan_counts(
    level: str, norms: str, watch: _Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = falcon()
    if norms == "fused":
        rms_norm_kernel.install(monkeypatch)
        fuse_norms(model)
    layer = describe_model(model, kernels=True).layers[1]
    assert (layer.mixer, layer.fused, layer.rank) == ("mamba", False, RANK)
    # No multiple of 8: the gradient of out_proj's input comes with the features side by side.
    tokens = Tokens(16, 1023, 2)
    x = torch.zeros(tokens.batch, tokens.length, WIDTH, requires_grad=True)
    block: nn.Module = model.backbone.layers[1]
    watch.without = [*model.parameters(), x]
    with apply_levels(model, [level] * 2), LiveStorages() as watch.live:
        y = block(x)
        watch.without.append(y)
        found = watch.live.bytes(without=watch.without)
        y.backward(torch.zeros_like(y))
    expected = kept(layer, tokens, level)
    if level != CHECKPOINT:
        # On the CPU the gradient towards out_proj's scale does not read its output.
        expected -= 2 * tokens.count * WIDTH
    assert found == pytest.approx(expected, rel=1e-3)
    assert watch.seen == pytest.approx(
        kept(layer, tokens, level) + workspace(layer, tokens, level), rel=0.015
    )


def test_a_gradient_with_tokens_side_by_side_is_not_copied() -> None:
    layer = describe_model(falcon(), kernels=True).layers[1]
    whole, odd = (workspace(layer, Tokens(64, length, 2), KEEP) for length in (1024, 1023))
    # One of five tensors of inner features, less than one token in a thousand aside.
    copy = 2 * 64 * 1024 * layer.inner
    assert odd - whole == pytest.approx(copy, rel=0.01)
