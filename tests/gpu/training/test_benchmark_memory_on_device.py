"""The benchmark's memory figures, which must not depend on when autograd's thread lets go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness import memory

pytestmark = pytest.mark.gpu


def test_a_frozen_layer_takes_its_output_and_dx_every_time() -> None:
    m, k, n = 4096, 1024, 512
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(m, k, **options).requires_grad_()  # type: ignore[call-overload]
    weight, dy = torch.randn(n, k, **options), torch.randn(m, n, **options)  # type: ignore[call-overload]

    def forward() -> Tensor:
        return linear(x, weight)

    def both() -> None:
        torch.autograd.grad(forward(), x, dy)

    both()
    for _ in range(100):
        both()
        used = memory.measure(forward, both, [weight, x], cuda=True)
        assert used.peak == pytest.approx((m * n + m * k) * 2 / 2**20, abs=0.1)
        assert used.held == pytest.approx(m * n * 2 / 2**20, abs=0.1)
        assert used.kept == 0.0
