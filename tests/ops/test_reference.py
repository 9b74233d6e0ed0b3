"""The definition against dense fp64 algebra, and the effective weight's rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prodial_kernels.ops.reference import effective_weight
from prodial_kernels.testing import LinearCase, make_case


def dense_weight(case: LinearCase) -> torch.Tensor:
    """W' = s ⊙ (W D_b) + α B A with a dense D_b, for diagonal="free"."""
    in_features = case.weight.shape[1]
    adapted = case.weight
    if case.blocks is not None:
        adapted = adapted @ (torch.eye(in_features).double() + torch.block_diag(*case.blocks))
    if case.scale is not None:
        adapted = torch.diag(case.scale) @ adapted
    if case.lora_a is not None and case.lora_b is not None:
        adapted = adapted + case.lora_scaling * case.lora_b @ case.lora_a
    return adapted


def weight_of(case: LinearCase) -> torch.Tensor:
    return effective_weight(
        case.weight, case.blocks, case.scale_deviation, case.lora_a, case.lora_b, case.lora_scaling,
        case.diagonal,
    )  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 2, 6, 12, 24, 48])
@pytest.mark.parametrize("absent", [(), ("blocks",), ("scale",), ("lora_a", "lora_b"), ("bias",)])
def test_definition(absent: tuple[str, ...], block_size: int) -> None:
    case = make_case((2, 9), 48, 29, block_size=block_size, diagonal="free")
    case = replace(case, **dict.fromkeys(absent))
    adapted = dense_weight(case)
    torch.testing.assert_close(weight_of(case), adapted)
    expected = case.x @ adapted.T
    if case.bias is not None:
        expected = expected + case.bias
    torch.testing.assert_close(case.reference(), expected)


def test_dropout_touches_the_lora_input_only() -> None:
    case = make_case(9, 12, 5, block_size=6, diagonal="free")
    nothing_kept = replace(
        case, dropout_mask=torch.zeros(9, 12, dtype=torch.bool), lora_dropout=0.5
    )
    without_lora = replace(case, lora_a=None, lora_b=None)
    torch.testing.assert_close(nothing_kept.reference(), without_lora.reference())
    all_kept = replace(case, dropout_mask=torch.ones(9, 12, dtype=torch.bool), lora_dropout=0.5)
    twice = replace(case, lora_scaling=2 * case.lora_scaling)
    torch.testing.assert_close(all_kept.reference(), twice.reference())


def test_effective_weight_is_rounded_once() -> None:
    case = make_case(1, 48, 29, block_size=6).cast(torch.bfloat16, torch.float32)
    exact = weight_of(case.cast(torch.float64, torch.float64))
    # Summed in fp32 and rounded at the end: half an ulp of bf16, and fp32's own error.
    error = (weight_of(case).double() - exact).abs()
    assert weight_of(case).dtype == torch.bfloat16
    assert (error <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_effective_weight_of_no_adapter_is_the_weight_itself() -> None:
    weight = torch.randn(3, 4)
    assert effective_weight(weight, None, None, None, None, 1.0, "relu") is weight


def test_reference_gives_the_weight_a_gradient() -> None:
    case = make_case(9, 12, 5, block_size=6)
    case.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(case.reference(), case.weight, case.grad_output)
    leaf = case.weight.detach().requires_grad_()
    adapted = weight_of(replace(case, weight=leaf))
    (expected,) = torch.autograd.grad(case.x @ adapted.T, leaf, case.grad_output)
    torch.testing.assert_close(gradient, expected)
