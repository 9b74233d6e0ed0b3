"""Codes in groups on a GPU: the kernel's bits, and a layer's product and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.stored.grouped_weights import STORED, stored
from support.stored.same_bits import assert_same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bits(dtype: torch.dtype) -> None:
    for arguments in STORED:
        assert_same_bits(stored(**arguments), dtype)


@pytest.mark.parametrize("arguments", [STORED[0], STORED[5], STORED[7]], ids=str)
def test_a_layer_computes_with_the_weight_it_stands_for(arguments: dict[str, Any]) -> None:
    layer = stored(**arguments).to(torch.bfloat16).cuda()
    x = torch.randn(64, layer.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, layer.out_features, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    weight = layer.cpu().dequantize().double().cuda()
    assert x.grad is not None
    for found, exact in ((y, x.double() @ weight.T), (x.grad, grad.double() @ weight)):
        error = (found.double() - exact).norm() / exact.norm()
        # One rounding to bf16 of each value.
        assert error < 2**-8
