"""The operator on channel-first operands."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from prodial_kernels.testing import LinearCase
from support.kernels.kernel_cases import triton_linear

LAYOUTS = [(True, False), (False, True), (True, True)]


def run(x_channel_first: bool, y_channel_first: bool, case: LinearCase) -> Tensor:
    """``case`` with x [b, l, K] and the result stored as asked; the result as [b, l, N]."""
    x = case.x.mT.contiguous().mT if x_channel_first else case.x
    y = triton_linear(replace(case, x=x), channel_first=y_channel_first)
    if y_channel_first:
        assert y.is_contiguous()
        assert y.shape == (x.shape[0], case.weight.shape[0], x.shape[1])
    return y.mT if y_channel_first else y
