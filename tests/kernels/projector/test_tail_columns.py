"""The last, nearly empty column of forward's tiles, computed by narrow tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels.kernels.choices.forward_plan import NARROW, choose_gemm, tail_columns
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import assert_case_accurate, make_case
from support.kernels.kernel_cases import replan, triton_linear, watch

HOPPER = DeviceLimits((9, 0), 132)


@pytest.mark.parametrize(
    ("m", "n", "expected"),
    [
        (2048, 8512, 64), (8192, 8512, 64), (2048, 10576, 80),
        # Whole columns of tiles; no round to spare; too wide to be an afterthought.
        (2048, 8192, 0), (2048, 3352, 0), (2048, 64, 0), (2048, 8448 + 192, 0),
    ],
)  # fmt: skip
def test_where_they_would_need_another_round(m: int, n: int, expected: int) -> None:
    assert tail_columns(m, n, choose_gemm(m, n, HOPPER), 132) == expected


@pytest.mark.parametrize(("m", "n", "bias"), [(200, 264, False), (200, 380, True)])
def test_the_same_product_in_two_launches(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, m: int, n: int, bias: bool
) -> None:
    launched = []

    def see(x: Tensor, v: Tensor, y: Tensor, **options: Any) -> None:
        launched.append((options["config"], v.shape[0]))

    watch(monkeypatch, passes, "launch_gemm", see)
    replan(monkeypatch, "forward", fused_low_rank=False, tail_columns=n - 256)
    case = make_case(m, 32, n, block_size=1, r=4, device=kernel_device)
    case = case if bias else replace(case, bias=None)
    assert_case_accurate(case, triton_linear, compute=torch.float16)
    recorded_calls.reset()
    (_, most), (config, rest), _ = launched
    assert (most, rest, config) == (256, n - 256, NARROW)
