"""The definition of rounding to fp8: nearest values, scales, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from prodial_kernels.ops.fp8.rounding import GROUP, fp8_product, round_to_fp8, rounded


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_no_value_of_the_format_is_nearer() -> None:
    x = random(5, 2 * GROUP) * torch.logspace(-9, 4, 5)[:, None]
    _, scale = round_to_fp8(x)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    grid = (values[None, None] * scale[..., None])[:, :, None]  # [rows, groups, 1, values]
    nearest = (x.unflatten(-1, (-1, GROUP))[..., None] - grid).abs().amin(-1).flatten(-2)
    assert torch.equal((x - rounded(x)).abs(), nearest)


def test_scales_are_the_least_powers_of_two_that_hold_the_group() -> None:
    x = random(64, 3 * GROUP, seed=1) * torch.logspace(-30, 30, 64)[:, None]
    _, scale = round_to_fp8(x)
    largest = x.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    assert torch.equal(scale.log2().round().exp2(), scale)
    assert (largest <= 448 * scale).all()
    assert (largest > 224 * scale).all()


@pytest.mark.parametrize("largest", [448.0, 449.0, 447.0, 2.0**-118, 1.75 * 2**100])
def test_scales_at_their_borders(largest: float) -> None:
    x = torch.zeros(1, GROUP)
    x[0, 3] = -largest
    codes, scale = round_to_fp8(x)
    assert scale.item() == 2.0 ** (max(largest, 448.0) > 448) if 400 < largest < 500 else True
    assert rounded(x)[0, 3].item() == pytest.approx(-largest, rel=2**-4)
    assert codes.float().abs().max() <= 448


def test_a_group_of_zeros_stays_zero_and_rows_do_not_touch_each_other() -> None:
    x = random(3, GROUP)
    x[1] = 0
    x[2, 0] = 1e4
    assert torch.equal(rounded(x)[1], torch.zeros(GROUP))
    assert torch.equal(rounded(x)[0], rounded(x[:1])[0])
    # An outlier costs what lies beside it its last bits, and no other group's.
    wide = torch.cat([x, random(3, GROUP, seed=2)], 1)
    assert torch.equal(rounded(wide)[:, GROUP:], rounded(wide[:, GROUP:]))


def test_what_is_not_finite_spoils_its_group_alone() -> None:
    x = random(3, 2 * GROUP)
    clean = rounded(x)
    x[0, 4], x[1, GROUP + 9] = float("inf"), float("nan")
    found = rounded(x)
    assert found[0, :GROUP].isnan().all()
    assert found[1, GROUP:].isnan().all()
    assert torch.equal(found[0, GROUP:], clean[0, GROUP:])
    assert torch.equal(found[1, :GROUP], clean[1, :GROUP])
    assert torch.equal(found[2], clean[2])


def test_a_last_group_may_be_smaller() -> None:
    x = random(4, GROUP + 5)
    codes, scale = round_to_fp8(x)
    assert codes.shape == x.shape
    assert scale.shape == (4, 2)
    assert torch.equal(rounded(x)[:, GROUP:], rounded(x[:, GROUP:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_values_are_exact_in_16_bits(dtype: torch.dtype) -> None:
    x = random(8, GROUP, seed=3).to(dtype)
    assert torch.equal(rounded(x).double(), rounded(x.double()))


def test_the_product_rounds_the_gradient_too_and_passes_it_straight_through() -> None:
    u, weight, grad = random(6, 130).double(), random(9, 130, seed=1).double(), random(6, 9, seed=2)
    u.requires_grad_()
    y = fp8_product(u, weight)
    assert torch.equal(y, rounded(u.detach()) @ weight.T)
    (du,) = torch.autograd.grad(y, u, grad.double())
    assert torch.equal(du, rounded(grad.double()) @ weight)
