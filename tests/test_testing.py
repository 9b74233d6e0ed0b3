"""The accuracy rule itself: what it lets through, what it must not, and what the cases hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prodial_kernels.testing import (
    LinearCase,
    assert_accurate,
    assert_all_accurate,
    assert_case_accurate,
    error_budget,
    make_case,
)

BF16 = torch.bfloat16


def rounded() -> tuple[Tensor, Tensor]:
    exact = torch.randn(100, dtype=torch.float64)
    return exact.to(BF16), exact


def test_budget_is_twice_eager_and_one_rounding() -> None:
    exact = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    eager = exact + torch.tensor([0.0, 0.0, 0.5])
    largest, typical = error_budget(eager, exact, BF16)
    assert largest == pytest.approx(2 * 0.5 + 4 * 2**-8)
    assert typical == pytest.approx(2 * (0.25 / 3) ** 0.5 + 7**0.5 * 2**-8)
    assert error_budget(exact, exact, torch.float32)[0] == pytest.approx(4 * 2**-24)


def test_the_rounded_exact_result_passes() -> None:
    result, exact = rounded()
    assert_accurate("y", result, exact, exact, BF16)
    assert_accurate("y", result, result, exact, BF16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_fail(value: float) -> None:
    result, exact = rounded()
    result[3] = value
    with pytest.raises(AssertionError, match="y: error max"):
        assert_accurate("y", result, result.clone().nan_to_num(0), exact, BF16)


def test_one_wrong_value_and_many_slightly_wrong_values_fail() -> None:
    _, exact = rounded()
    one = exact.clone()
    one[5] += 0.1
    with pytest.raises(AssertionError, match="error max"):
        assert_accurate("y", one, exact, exact, BF16)
    # Each below the maximum, but all in one direction and larger than roundings are.
    many = exact + 0.9 * error_budget(exact, exact, BF16)[0]
    with pytest.raises(AssertionError, match="rms"):
        assert_accurate("y", many, exact, exact, BF16)


def test_wrong_shape_and_missing_results_fail() -> None:
    result, exact = rounded()
    with pytest.raises(AssertionError, match=r"y: shape \[50, 2\], expected \[100\]"):
        assert_accurate("y", result.reshape(50, 2), exact, exact, BF16)
    with pytest.raises(AssertionError, match=r"got \['y'\], expected \['d_x', 'y'\]"):
        assert_all_accurate({"y": result}, {"y": exact, "d_x": exact},
                            {"y": exact, "d_x": exact}, BF16)  # fmt: skip


def test_empty_results_pass() -> None:
    empty = torch.empty(0, 3, dtype=torch.float64)
    assert_accurate("y", empty.to(BF16), empty, empty, BF16)


@pytest.mark.parametrize("wrong", ["output", "d_x", "d_blocks", "d_scale", "d_lora_a", "d_lora_b",
                                   "d_bias"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_case_finds_a_five_percent_error_anywhere(wrong: str, dtype: torch.dtype) -> None:
    case = make_case(63, 42, 29, block_size=6)

    class Scaled(torch.autograd.Function):
        """The identity, with its gradient 5% too large."""

        @staticmethod
        def forward(ctx: object, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 1.05

    def function(case: LinearCase) -> Tensor:
        if wrong == "output":
            return case.reference() * 1.05
        name = wrong.removeprefix("d_")
        case.__dict__[name] = Scaled.apply(getattr(case, name))
        return case.reference()

    assert_case_accurate(case, LinearCase.reference, compute=dtype)
    with pytest.raises(AssertionError, match=f"{wrong}: error"):
        assert_case_accurate(case, function, compute=dtype)


def test_make_case() -> None:
    case = make_case((2, 3), 12, 5, block_size=6, r=4, diagonal="free", seed=7)
    assert case.x.shape == (2, 3, 12)
    assert case.weight.shape == (5, 12)
    assert case.blocks.shape == (2, 6, 6)
    assert case.lora_a.shape == (4, 12)
    assert case.lora_b.shape == (5, 4)
    assert case.grad_output.shape == (2, 3, 5)
    assert case.diagonal == "free"
    assert torch.equal(make_case((2, 3), 12, 5, block_size=6, seed=7).x, case.x)
    assert not torch.equal(make_case((2, 3), 12, 5, block_size=6, seed=8).x, case.x)


def test_cast_rounds_each_operand_to_its_dtype_and_keeps_strides() -> None:
    case = make_case(9, 12, 5)
    cast = case.cast(BF16, torch.float32)
    assert {cast.x.dtype, cast.weight.dtype, cast.bias.dtype, cast.grad_output.dtype} == {BF16}
    assert {cast.blocks.dtype, cast.scale.dtype, cast.lora_a.dtype, cast.lora_b.dtype} == {
        torch.float32
    }
    assert case.x.dtype == torch.float64
    case.x = case.x.T.contiguous().T
    assert case.cast(BF16, torch.float32).x.stride() == case.x.stride()


def test_run_returns_a_gradient_for_every_part_that_is_there() -> None:
    case = make_case(9, 12, 5)
    names = {"output", "d_x", "d_blocks", "d_scale", "d_lora_a", "d_lora_b", "d_bias"}
    assert case.run(LinearCase.reference).keys() == names
    case.scale = None
    assert case.run(LinearCase.reference).keys() == names - {"d_scale"}
