"""A mixer's input made again from what mamba_ssm's fused norm keeps, with a norm that stands in."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prodial_kernels import (
    AffixTuning,
    ProdialConfig,
    apply_methods,
    apply_prodial,
    remove_prodial,
)
from prodial_kernels.models.mixers import mamba1_block, mamba_ssm
from prodial_kernels.models.mixers.recomputed_norm import norm_recomputation
from prodial_kernels.ops import projection
from prodial_kernels.ops.prefetch import Prefetch
from support.mixers import cuda_stand_ins
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2
from support.models import randomise_adapters

MODULE = "mamba_ssm.ops.triton.layer_norm"


def _layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: None, eps: float, out_dtype: torch.dtype | None = None,
    is_rms_norm: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert is_rms_norm
    assert bias is None
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * rstd * weight).to(out_dtype or x.dtype), rstd


class LayerNormFn(torch.autograd.Function):
    """As far as upstream's keeps and says of itself; x + residual -> (normed, sum)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, residual_in_fp32: bool,
        rowscale: Tensor | None, dropout_p: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total = x.float() if residual is None else x.float() + residual.float()
        total = total if residual_in_fp32 else total.to(x.dtype)
        rows = total.reshape(-1, x.shape[-1])
        y, rstd = _layer_norm_fwd(rows, weight, None, 1e-5, out_dtype=x.dtype)
        ctx.save_for_backward(rows, weight, None, None, None, rowscale, None, None, rstd)
        ctx.x_shape_og, ctx.eps, ctx.dropout_p, ctx.is_rms_norm = x.shape, 1e-5, dropout_p, True
        ctx.has_residual, ctx.has_x1, ctx.prenorm, ctx.x_dtype = (
            residual is not None,
            False,
            True,
            x.dtype,
        )
        return y.reshape(x.shape), total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *_ = ctx.saved_tensors
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            y, _ = _layer_norm_fwd(leaf, weight, None, ctx.eps, out_dtype=ctx.x_dtype)
        (drows,) = torch.autograd.grad(y, leaf, dy.reshape(rows.shape))
        dx = drows.reshape(ctx.x_shape_og) + dtotal
        return dx.to(ctx.x_dtype), None, dx if ctx.has_residual else None, None, None, None


LayerNormFn.__module__ = MODULE


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    module = ModuleType(MODULE)
    module.__dict__["_layer_norm_fwd"] = _layer_norm_fwd
    monkeypatch.setitem(sys.modules, MODULE, module)


class Blocks(nn.Module):
    """Norm, mixer, norm, mixer as mamba_ssm's ``Block`` chains them."""

    def __init__(self, mixer: type[nn.Module], impl: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.mixer, layer.weight = mixer(8, dtype=dtype), nn.Parameter(torch.randn(8))
        self.requires_grad_(False)
        config = ProdialConfig(r=2, block_size=2, impl=impl)
        apply_prodial(self, config)
        randomise_adapters(self)

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        residual = None
        for layer in self.layers:

            def run(x: Tensor, residual: Tensor | None, layer: nn.Module = layer) -> Any:
                x, residual = LayerNormFn.apply(x, layer.weight, residual, True, None, 0.0)
                return layer.mixer(x), residual

            if checkpointed:
                x, residual = checkpoint(run, x, residual, use_reentrant=False)
            else:
                x, residual = run(x, residual)
        return x


def step(model: Blocks, x: Tensor, **options: Any) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = x.detach().requires_grad_()
    y = model(x, **options)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


@pytest.fixture(params=[(m, impl) for m in (Mamba, Mamba2) for impl in ("torch", "triton")])
def model(request: pytest.FixtureRequest) -> Blocks:
    mixer, impl = request.param
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("the Triton interpreter is off where there is a GPU")
    return Blocks(mixer, impl, torch.float32 if impl == "torch" else torch.float16)


# The kernels, interpreted, see either mixer and either way once.
@pytest.mark.parametrize(
    ("model", "recompute_xz"),
    [
        *(((mixer, "torch"), again) for mixer in (Mamba, Mamba2) for again in (False, True)),
        ((Mamba, "triton"), True), ((Mamba2, "triton"), False),
    ],
    indirect=["model"],
)  # fmt: skip
def test_the_same_gradients_without_keeping_the_input(
    model: Blocks, recompute_xz: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = model.layers[0].mixer.conv1d.weight.dtype
    x = torch.randn(2, 16, 8, dtype=dtype)
    for layer in model.layers:
        layer.mixer.prodial_recompute_xz = recompute_xz
    made: list[Tensor | None] = []

    def counted(hidden: Tensor) -> Any:
        again = norm_recomputation(hidden)
        assert again is not None
        assert torch.equal(again(), hidden)

        def run() -> Tensor:
            made.append(again())
            return made[-1]

        return run

    for module in (mamba1_block, mamba_ssm):
        monkeypatch.setattr(module, "norm_recomputation", counted)
    recomputed = step(model, x)
    # Once in each layer's backward, for xz and for in_proj's gradients alike.
    assert len(made) == 2
    for module in (mamba1_block, mamba_ssm):
        monkeypatch.setattr(module, "norm_recomputation", lambda hidden: None)
    for tensor, expected in zip(recomputed, step(model, x), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0 if dtype.itemsize > 2 else 4e-3)


@pytest.mark.parametrize("recompute_xz", [False, True])
def test_the_same_gradients_with_tokens_inserted(
    recompute_xz: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made again gets the places of affix-tuning's tokens, as the input did."""
    model = Blocks(Mamba, "torch", torch.float32)
    remove_prodial(model)
    apply_methods(model, [ProdialConfig(r=2, block_size=2, impl="torch"), AffixTuning(3)])
    randomise_adapters(model)
    for layer in model.layers:
        layer.mixer.prodial_recompute_xz = recompute_xz
    made: list[Tensor] = []

    def counted(hidden: Tensor) -> Any:
        again = norm_recomputation(hidden)
        assert again is not None
        return lambda: made.append(again()) or made[-1]

    monkeypatch.setattr(mamba1_block, "norm_recomputation", counted)
    recomputed = step(model, x := torch.randn(2, 13, 8))
    assert len(made) == 2
    monkeypatch.setattr(mamba1_block, "norm_recomputation", lambda hidden: None)
    for tensor, expected in zip(recomputed, step(model, x), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("mixer", [Mamba, Mamba2])
def test_prefetching_changes_nothing(
    mixer: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the Triton interpreter is off where there is a GPU; tests/gpu has this too")
    model = Blocks(mixer, "triton", torch.float16)
    x = torch.randn(2, 16, 8, dtype=torch.float16)
    expected = step(model, x)
    calls: list[str] = []

    class Counted(Prefetch[Any]):
        def __init__(self, device: torch.device, function: Any) -> None:
            calls.append("wait")
            super().__init__(device, function)

        def start(self) -> None:
            calls.append("start")
            super().start()

        def take(self) -> Any:
            calls.append("take")
            return super().take()

    monkeypatch.setattr(projection, "LEAST_PREFETCHED", 1)
    for module in (mamba1_block, mamba_ssm):
        monkeypatch.setattr(module, "Prefetch", Counted)
    for tensor, other in zip(step(model, x), expected, strict=True):
        assert torch.equal(tensor, other)
    assert calls == ["wait", "start", "take"] * 2


def test_the_input_is_not_kept(model: Blocks) -> None:
    dtype = model.layers[0].mixer.conv1d.weight.dtype
    layer = model.layers[0]
    x = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    hidden, _ = LayerNormFn.apply(x, layer.weight, None, True, None, 0.0)
    y = layer.mixer(hidden)
    saved = kept_by(y.grad_fn, until=hidden.grad_fn)
    assert saved
    assert hidden.data_ptr() not in saved
    assert (y.data_ptr() in saved) is (dtype == torch.float16), "Y stands in for X in the kernels"


def kept_by(node: Any, until: Any) -> set[int]:
    """Addresses of what the functions between two nodes of the graph keep."""
    if node is None or node is until:
        return set()
    own = {t.data_ptr() for t in getattr(node, "saved_tensors", ()) if t is not None}
    return own.union(*(kept_by(next_node, until) for next_node, _ in node.next_functions))


@pytest.mark.parametrize(
    "model", [(Mamba, "torch"), (Mamba2, "torch"), (Mamba2, "triton")], indirect=True
)
def test_checkpointing_keeps_what_it_unpacks(model: Blocks) -> None:
    dtype = model.layers[0].mixer.conv1d.weight.dtype
    x = torch.randn(2, 16, 8, dtype=dtype)
    for tensor, expected in zip(step(model, x, checkpointed=True), step(model, x), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0 if dtype.itemsize > 2 else 4e-3)


def test_when_it_is_not_the_norm_s_output() -> None:
    weight, x = torch.ones(8), torch.randn(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(2, 4, 8)
    assert norm_recomputation(x) is None
    assert norm_recomputation(x * 2) is None
    normed, total = LayerNormFn.apply(x, weight, residual, True, None, 0.0)
    assert norm_recomputation(normed) is not None
    assert norm_recomputation(total) is None
    assert norm_recomputation(normed * 1) is None
    rounded, _ = LayerNormFn.apply(x, weight, residual, False, None, 0.0)
    assert norm_recomputation(rounded) is None, "the sum was rounded after the norm read it"
    dropped, _ = LayerNormFn.apply(x, weight, residual, True, None, 0.5)
    assert norm_recomputation(dropped) is None
    scaled, _ = LayerNormFn.apply(x, weight, residual, True, torch.ones(2), 0.0)
    again = norm_recomputation(scaled)
    assert again is not None
    with pytest.raises(RuntimeError, match="rowscale"):
        again()
