"""The kernels on channel-first matrices of tokens, in every mixture of layouts, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prodial_kernels.ops.layout import token_matrix
from prodial_kernels.testing import make_case
from support.kernels.channel_first import LAYOUTS, run
from support.kernels.kernel_cases import assert_matches_fp64, triton_linear

# b, l, K, N, P, r: sequences shorter and longer than a tile, features that no tile divides.
SHAPES = [
    pytest.param(2, 40, 48, 72, 1, 4, id="b2-l40-K48-N72-P1-r4"),
    pytest.param(3, 136, 36, 40, 6, 17, id="b3-l136-K36-N40-P6-r17"),
    pytest.param(1, 8, 96, 33, 48, 70, id="b1-l8-K96-N33-P48-r70"),
    # Blocks and ranks that library products take over.
    pytest.param(2, 16, 288, 40, 144, 6, id="b2-l16-K288-N40-P144-r6"),
    pytest.param(2, 24, 48, 72, 12, 130, id="b2-l24-K48-N72-P12-r130"),
    # Nothing that the copy engine can address.
    pytest.param(2, 37, 24, 40, 12, 3, id="b2-l37-K24-N40-P12-r3"),
]


@pytest.mark.parametrize(("x_channel_first", "y_channel_first"), LAYOUTS)
@pytest.mark.parametrize(("b", "length", "k", "n", "p", "r"), SHAPES)
def test_output_and_gradients(
    kernel_device: str, b: int, length: int, k: int, n: int, p: int, r: int,
    x_channel_first: bool, y_channel_first: bool,
) -> None:  # fmt: skip
    case = make_case((b, length), k, n, block_size=p, r=r, device=kernel_device)
    assert_matches_fp64(
        case, compute=torch.float16, function=lambda c: run(x_channel_first, y_channel_first, c)
    )


@pytest.mark.parametrize(
    "parts", [{"bias": None}, {"lora_a": None, "lora_b": None}, {"blocks": None}, {"scale": None}]
)
def test_without_a_part(kernel_device: str, parts: dict[str, None]) -> None:
    case = replace(make_case((2, 24), 24, 40, block_size=6, device=kernel_device), **parts)
    for layout in LAYOUTS:
        assert_matches_fp64(case, compute=torch.float16, function=lambda c, a=layout: run(*a, c))


def test_a_scale_of_zero(kernel_device: str) -> None:
    case = make_case((2, 16), 24, 40, block_size=6, device=kernel_device)
    case = replace(case, scale=torch.where(torch.arange(40, device=kernel_device) % 3 == 0, 0.0,
                                           case.scale))  # fmt: skip
    for layout in LAYOUTS:
        assert_matches_fp64(case, compute=torch.float16, function=lambda c, a=layout: run(*a, c))


def test_dropout_draws_one_mask_in_every_layout(kernel_device: str) -> None:
    case = make_case((2, 16), 24, 40, block_size=6, device=kernel_device)
    case = replace(case.cast(torch.float16, torch.float32), lora_dropout=0.5)
    gradients = []
    for layout in [(False, False), *LAYOUTS]:
        torch.manual_seed(0)
        leaves = replace(case, x=case.x.detach().requires_grad_())
        output = run(*layout, leaves)
        gradients.append((output, *torch.autograd.grad(output, leaves.x, case.grad_output)))
    for found in gradients[1:]:
        for tensor, expected in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=2e-3, atol=2e-3)


def test_nothing_is_transposed(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither X nor Y, dY and dX are copied into the other layout."""
    case = make_case((2, 16), 24, 40, device=kernel_device).cast(torch.float16, torch.float32)
    x = case.x.mT.contiguous()
    assert token_matrix(x.mT).data_ptr() == x.data_ptr()
    made: list[int] = []
    contiguous = Tensor.contiguous

    def counted(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if tensor.numel() >= 2 * 16 * 24 and not tensor.is_contiguous():
            made.append(tensor.numel())
        return contiguous(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "contiguous", counted)
    leaf = x.requires_grad_()
    y = triton_linear(replace(case, x=leaf.mT), channel_first=True)
    (dx,) = torch.autograd.grad(y, leaf, case.grad_output.mT.contiguous().detach())
    assert dx.is_contiguous()
    # The gradient handed in above is the one copy.
    assert made == [case.grad_output.numel()]
