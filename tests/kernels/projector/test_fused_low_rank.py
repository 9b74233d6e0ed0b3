"""H = X Aᵀ, computed within forward's product where that costs less than a pass over X."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices.forward_plan import fuses_low_rank
from prodial_kernels.kernels.choices.tile_sizes import MAX_FUSED_RANK
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case
from support.kernels.kernel_cases import replan, triton_linear, watch

HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("m", "n", "r_pad", "expected"),
    [
        (2048, 768, 16, True), (2048, 3072, 32, True), (2048, 4096, 16, False),
        (2048, 2048, 64, True), (2048, 3072, 64, False), (2048, 768, 2 * MAX_FUSED_RANK, False),
        (16384, 768, 16, True), (16384, 2048, 16, False), (8192, 3072, 32, False),
        (8192, 2048, 64, True),
    ],
)  # fmt: skip
def test_for_few_columns_and_ranks_that_fit(m: int, n: int, r_pad: int, expected: bool) -> None:
    assert fuses_low_rank(m, n, r_pad, HOPPER) is expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_on_no_device_where_it_was_not_measured(capability: tuple[int, int]) -> None:
    assert not fuses_low_rank(2048, 768, 16, capability)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which launch made H, call by call."""
    calls = []

    def see_prepare(*args: Any, low_rank_of: Any = None, **options: Any) -> None:
        if low_rank_of is not None:
            calls.append("prepare")

    def see_gemm(*args: Any, **options: Any) -> None:
        if options.get("inner") is not None and options.get("outer") is not None:
            calls.append("gemm")

    watch(monkeypatch, passes, "launch_prepare", see_prepare)
    watch(monkeypatch, passes, "launch_gemm", see_gemm)
    return calls


def case_of(device: str, k: int = 48, n: int = 40, r: int = 5, m: int = 70) -> LinearCase:
    return make_case(m, k, n, block_size=1, r=r, device=device)


# Ranks that are padded to 16, 32 and 64, and one that fills its width.
@pytest.mark.parametrize(
    ("fused", "r"), [(True, 1), (True, 16), (True, 20), (True, 50), (False, 16), (False, 50)]
)
def test_both_ways_give_the_definition(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, made: list[str], fused: bool, r: int
) -> None:
    replan(monkeypatch, "forward", fused_low_rank=fused)
    case = case_of(kernel_device, r=r)
    for part in ({}, {"bias": None}, {"blocks": None}, {"scale": None}):
        assert_case_accurate(replace(case, **part), triton_linear, compute=torch.float16)
    recorded_calls.reset()
    assert set(made) == {"gemm" if fused else "prepare"}


@pytest.mark.parametrize(
    "shape", [{"k": 44}, {"n": 36}, {"k": 45, "n": 37}, {"m": 24, "n": 512}], ids=str
)
def test_not_where_rows_are_not_aligned_or_blocks_apply_to_activations(
    kernel_device: str, made: list[str], shape: dict[str, int]
) -> None:
    recorded_calls.reset()
    assert_case_accurate(case_of(kernel_device, **shape), triton_linear, compute=torch.float16)
    recorded_calls.reset()
    assert set(made) == {"prepare"}
