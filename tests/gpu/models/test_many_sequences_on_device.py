"""More sequences in a batch than the second axis of CUDA's grid holds: short ones, as of pixels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.mamba_ssm_loaded import CONFIG, MARKS, WIDTH, adapt

pytestmark = MARKS

MANY = 2**16 + 9


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """A mixer as upstream has it, and the same one adapted."""
    import mamba_ssm

    torch.manual_seed(0)
    plain = nn.Module()
    options: dict[str, Any] = {"headdim": 64} if name == "Mamba2" else {}
    plain.mixer = getattr(mamba_ssm, name)(WIDTH, device="cuda", dtype=torch.bfloat16, **options)
    return plain, adapt(copy.deepcopy(plain), CONFIG)


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module.mixer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def ends(function: Any, *arguments: Any) -> str:
    """How a call ends: well, or in which error."""
    try:
        function(*arguments)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return type(error).__name__
    return "well"


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The same but for rounding in bf16: few tokens are computed in other tiles than many.

    Measured against the tensor, since single elements are differences of larger ones. A sequence
    that another one has overwritten, or that nobody wrote, is off by its own size.
    """
    found, expected = found.float(), expected.float()
    off = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert off.max() <= 2e-2, f"sequence {int(off.argmax())} is off by {float(off.max()):.3g}"


# Channel-first as it lies, and transposed.
@pytest.mark.parametrize("length", [8, 12])
def test_mamba(length: int) -> None:
    plain, adapted = both("Mamba")
    x = torch.randn(MANY, length, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert ends(step, plain, x) == "well"
    y, dx = step(adapted, x)
    # No sequence depends on another.
    for first in (0, MANY - 100):
        part = slice(first, first + 100)
        part_y, part_dx = step(adapted, x[part].contiguous())
        assert_near(y[part], part_y)
        assert_near(dx[part], part_dx)


@pytest.mark.parametrize("length", [8, 12])
def test_mamba2_ends_as_the_plain_mixer_does(length: int) -> None:
    """Upstream's own kernels put batches on the second axis."""
    plain, adapted = both("Mamba2")
    x = torch.randn(MANY, length, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert ends(step, adapted, x) == ends(step, plain, x)
