"""Fused norms on a GPU: PyTorch's kernel runs, is as close to fp64, keeps little, and is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.testing import assert_all_accurate
from support.captured.on_device import microseconds

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
KERNEL = "FusedRmsNormBackward0"


def one_norm(width: int, dtype: torch.dtype) -> Any:
    """transformers' norm with a weight that is not at rest."""
    from transformers.models.mamba.modeling_mamba import MambaRMSNorm

    norm: Any = MambaRMSNorm(width, eps=1e-5)
    norm.weight = nn.Parameter(1 + 0.3 * torch.randn(width))
    return norm.to(DEVICE, dtype)


def results(norm: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    dx, dweight = torch.autograd.grad(y, [x, norm.weight], dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("width", [100, 768, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_close_to_fp64_as_transformers_own(dtype: torch.dtype, width: int) -> None:
    norm = one_norm(width, dtype)
    x, dy = (torch.randn(2, 257, width, device=DEVICE, dtype=dtype) for _ in range(2))
    x[:, 0] *= 1e-2
    eager = results(norm, x, dy)
    x64, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    y = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * weight
    dx, dweight = torch.autograd.grad(y, [x64, weight], dy.double())
    assert len(fuse_norms(norm)) == 1
    found = results(norm, x, dy)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in eager.items()}
    assert_all_accurate(
        found, eager, {"y": y.detach(), "dx": dx, "dweight": dweight}, dtype
    )  # fmt: skip


@pytest.mark.parametrize("width", [16, 256])
def test_without_a_weight_on_a_slice(width: int) -> None:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaWeightlessRMSNorm

    norm: Any = FalconMambaWeightlessRMSNorm(512, eps=1e-6).to(DEVICE, torch.bfloat16)
    whole = torch.randn(2, 257, width + 32, device=DEVICE, dtype=torch.bfloat16)
    x = whole[..., 8 : 8 + width].detach().requires_grad_()
    dy = torch.randn_like(x)

    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
        y = function(x)
        return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy.to(y.dtype))[0]}

    def plain(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    eager = run(norm, x)
    assert len(fuse_norms(norm)) == 1
    exact = run(plain, x.detach().double().requires_grad_())
    assert_all_accurate(run(norm, x), eager, exact, torch.bfloat16)


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        # The last norm of a model, behind a residual in fp32.
        (torch.float32, torch.bfloat16, False),
    ],
)
def test_is_the_kernel_and_keeps_little(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    norm = one_norm(1024, weight_dtype).requires_grad_(False)
    x = torch.randn(4, 512, 1024, device=DEVICE, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = norm(x)
        fuse_norms(norm)
        norm(x)
        before = torch.cuda.memory_allocated()
        y = norm(x)
        kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert y.dtype == expected.dtype
    assert y.grad_fn is not None
    assert y.grad_fn.name() == KERNEL
    # The deviations, and the weight in the input's dtype.
    assert 0 < kept <= 4 * 4 * 512 + 4 * 1024 + 1024


@pytest.mark.alone
def test_takes_a_fraction_of_the_time() -> None:
    norm = one_norm(2048, torch.bfloat16).requires_grad_(False)
    x = torch.randn(8192, 2048, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(norm(x), x, dy)

    eager = microseconds(step)
    fuse_norms(norm)
    fused = microseconds(step)
    print(f"norm forward and backward, 8192 x 2048: {eager:.0f} µs eager, {fused:.0f} µs fused")
    assert fused < eager / 3
