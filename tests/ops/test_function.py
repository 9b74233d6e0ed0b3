"""The autograd rule of the kernels: shapes on the way in and out, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prodial_kernels import prodial_linear
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case


def run(case: LinearCase, **changes: Any) -> Tensor:
    options = {
        "blocks": case.blocks, "scale": case.scale, "lora_a": case.lora_a, "lora_b": case.lora_b,
        "bias": case.bias, "lora_scaling": case.lora_scaling, "impl": "triton", **changes,
    }  # fmt: skip
    return prodial_linear(case.x, case.weight, **options)


@pytest.mark.parametrize("tokens", [(5,), (2, 8), (2, 3, 8), (1, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("channel_first", [False, True])
def test_any_leading_shape(
    kernel_device: str, tokens: tuple[int, ...], channel_first: bool
) -> None:
    if channel_first and len(tokens) == 1:
        tokens = (8,)
    # As many features as tokens: a transposed gradient would have the right shape.
    case = make_case(tokens, 8, 24, block_size=2, device=kernel_device)

    def function(one: LinearCase) -> Tensor:
        y = run(one, channel_first=channel_first)
        return y.transpose(-1, -2) if channel_first else y

    assert_case_accurate(case, function, compute=torch.float16)


def test_a_channel_first_square(kernel_device: str) -> None:
    case = make_case((2, 16), 16, 16, block_size=4, device=kernel_device)

    def function(one: LinearCase) -> Tensor:
        x = one.x.mT.contiguous().mT
        return run(replace(one, x=x), channel_first=True).mT

    assert_case_accurate(case, function, compute=torch.float16)


def rounded(device: str) -> LinearCase:
    return make_case((2, 8), 8, 24, block_size=2, device=device).cast(torch.float16, torch.float32)


def test_a_second_derivative_is_refused(kernel_device: str) -> None:
    case = rounded(kernel_device)
    x = case.x.requires_grad_()
    dy = case.grad_output.requires_grad_()
    (dx,) = torch.autograd.grad(run(case), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_the_output_may_be_changed_in_place_only_where_it_is_not_kept(kernel_device: str) -> None:
    case = rounded(kernel_device)
    x = case.x.requires_grad_()
    run(case).relu_().sum().backward()
    assert x.grad is not None
    assert case.scale is not None
    y = run(replace(case, scale=case.scale.requires_grad_())).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_dispatch_mode_sees_the_operators(kernel_device: str) -> None:
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case = rounded(kernel_device)
    x = case.x.requires_grad_()
    with Mode():
        run(case).sum().backward()
    ours = [name for name in seen if name.startswith("prodial_kernels")]
    assert ours == ["prodial_kernels.linear_forward.default",
                    "prodial_kernels.linear_backward.default"]  # fmt: skip
    by_mode = x.grad
    x.grad = None
    run(case).sum().backward()
    assert by_mode is not None
    assert x.grad is not None
    assert torch.equal(x.grad, by_mode)
