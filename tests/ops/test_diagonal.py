"""From the paper's D_a to D_b = I + E: Eq. 7, the subgradient at 0, and 16-bit resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prodial_kernels.ops.diagonal import (
    block_outer_product,
    deviation,
    deviation_backward,
    rotate,
    rotate_weight,
)

BLOCK_SIZES = (1, 2, 6, 12, 24, 48)


def draw(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * std


def equation_7(blocks: Tensor) -> Tensor:
    """D_b as the paper writes it, with PyTorch's own relu, dense: [K, K]."""
    d_a = torch.block_diag(*blocks)
    identity = torch.eye(d_a.shape[0], dtype=d_a.dtype)
    on_blocks = torch.block_diag(*torch.ones_like(blocks))
    return (identity - torch.relu(identity * d_a)) + (on_blocks - identity) * d_a


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_relu_is_equation_7(block_size: int) -> None:
    blocks = draw(3, block_size, block_size).requires_grad_()
    expected = equation_7(blocks)
    e = deviation(blocks, "relu")
    dense = torch.eye(3 * block_size, dtype=torch.float64) + torch.block_diag(*e)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-15)
    # Away from 0 the gradients agree as well.
    grad = draw(3 * block_size, 3 * block_size, seed=1)
    (theirs,) = torch.autograd.grad(expected, blocks, grad)
    (ours,) = torch.autograd.grad(dense, blocks, grad)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("diagonal", ["relu", "free"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_zero_blocks_are_the_identity(block_size: int, diagonal: str) -> None:
    x = draw(5, 2 * block_size)
    assert torch.equal(rotate(x, deviation(torch.zeros(2, block_size, block_size), diagonal)), x)


def test_free_is_identity_plus_blocks() -> None:
    blocks = draw(3, 4, 4)
    assert torch.equal(deviation(blocks, "free"), blocks)


def test_pytorch_relu_never_moves_a_zero_diagonal_and_ours_does() -> None:
    zero = torch.zeros(4, 1, 1, dtype=torch.float64, requires_grad=True)
    x, weight = draw(7, 4), draw(5, 4, seed=1)

    (dead,) = torch.autograd.grad((x @ equation_7(zero).T @ weight.T).square().sum(), zero)
    assert torch.equal(dead, torch.zeros_like(dead))

    rotated = rotate(x, deviation(zero, "relu"))
    (alive,) = torch.autograd.grad((rotated @ weight.T).square().sum(), zero)
    assert (alive != 0).all()


@pytest.mark.parametrize("block_size", [1, 6])
def test_hand_written_gradient_is_that_of_autograd_even_at_zero(block_size: int) -> None:
    blocks = draw(2, block_size, block_size)
    blocks[0, 0, 0] = 0.0
    blocks[1, 0, 0] = -0.0
    grad = draw(2, block_size, block_size, seed=1)
    for diagonal in ("relu", "free"):
        leaf = blocks.clone().requires_grad_()
        (expected,) = torch.autograd.grad(deviation(leaf, diagonal), leaf, grad)
        assert torch.equal(deviation_backward(grad, blocks, diagonal), expected)
    # Subgradient 1 of the relu at 0, so -1 through D_b = 1 - relu(a).
    at_zero = deviation_backward(grad, blocks, "relu")[:, 0, 0]
    assert torch.equal(at_zero, -grad[:, 0, 0])


def test_negative_diagonals_are_clipped_with_zero_gradient() -> None:
    blocks = torch.full((3, 1, 1), -0.5)
    zero = torch.zeros(3, 1, 1)
    assert torch.equal(deviation(blocks, "relu"), zero)
    assert torch.equal(deviation_backward(torch.ones(3, 1, 1), blocks, "relu"), zero)


@pytest.mark.parametrize("diagonal", ["relu", "free"])
def test_nan_and_infinity_pass_through(diagonal: str) -> None:
    blocks = torch.zeros(1, 2, 2)
    blocks[0, 0, 0], blocks[0, 1, 1], blocks[0, 0, 1] = float("nan"), float("inf"), float("nan")
    e = deviation(blocks, diagonal)
    assert e[0, 0, 0].isnan()
    assert e[0, 0, 1].isnan()
    assert e[0, 1, 1].isinf()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_products_with_the_dense_matrix(block_size: int) -> None:
    width = 3 * block_size
    e = draw(3, block_size, block_size)
    dense = torch.eye(width, dtype=torch.float64) + torch.block_diag(*e)
    x, weight = draw(2, 5, width, seed=1), draw(7, width, seed=2)
    torch.testing.assert_close(rotate(x, e), x @ dense.T)
    torch.testing.assert_close(rotate(x, e, transpose=True), x @ dense)
    torch.testing.assert_close(rotate_weight(weight, e), weight @ dense)


@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_outer_product_is_the_diagonal_of_the_dense_one(block_size: int, tokens: int) -> None:
    width = 3 * block_size
    du, x = draw(tokens, width), draw(tokens, width, seed=1)
    dense = (du.T @ x).reshape(3, block_size, 3, block_size)
    expected = torch.stack([dense[g, :, g] for g in range(3)])
    torch.testing.assert_close(block_outer_product(du, x, block_size), expected)


def test_bf16_resolves_deviations_that_the_factor_itself_would_lose() -> None:
    """1 + 0.0035 rounds to 1 in bf16; the deviation 0.0035 does not, and moves U by its size."""
    e = 0.0035 * torch.eye(6).expand(8, 6, 6)
    x = draw(256, 48).to(torch.bfloat16)
    factor = torch.eye(6) + e[0]
    assert torch.equal(factor.to(torch.bfloat16), torch.eye(6, dtype=torch.bfloat16))
    moved = (rotate(x, e).double() - x.double()) / (0.0035 * x.double())
    # Single elements can only stay or move by a whole ulp; on average they move as they should.
    assert 0.7 < moved.mean() < 1.4
