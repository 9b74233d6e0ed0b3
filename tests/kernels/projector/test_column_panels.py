"""A weight that is made in column panels, each in the memory of the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prodial_kernels.kernels.choices.forward_plan import choose_gemm
from prodial_kernels.kernels.choices.tile_sizes import (
    PANEL_BYTES,
    DeviceLimits,
    column_panels,
    pointer_gemm,
    tiles_of,
)
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import assert_case_accurate, make_case
from support.kernels.channel_first import LAYOUTS, run
from support.kernels.kernel_cases import replan

HOPPER = DeviceLimits((9, 0), 132)


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(16384, 2048, 8192), (8192, 2048, 8192), (8192, 4096, 16384), (16384, 5120, 20480)],
)
def test_parts_are_small_and_take_no_more_rounds(m: int, k: int, n: int) -> None:
    config = choose_gemm(m, n, HOPPER)
    parts = column_panels(m, n, 2 * k, config)
    assert len(parts) > 1
    assert [first for first, _ in parts] == [
        sum(s for _, s in parts[:i]) for i in range(len(parts))
    ]
    assert sum(size for _, size in parts) == n
    assert max(size for _, size in parts) * 2 * k <= PANEL_BYTES
    rounds = [-(-tiles_of(config, m, size) // 132) for size in (n, *(size for _, size in parts))]
    assert sum(rounds[1:]) <= 1.04 * rounds[0]


@pytest.mark.parametrize(("m", "k", "n"), [(2048, 4096, 16384), (16384, 768, 3072)])
def test_few_tokens_or_a_small_weight_are_not_worth_it(m: int, k: int, n: int) -> None:
    assert column_panels(m, n, 2 * k, choose_gemm(m, n, HOPPER)) == ((0, n),)


def test_parts_that_take_more_rounds_are_not() -> None:
    # 8 columns of 128 tiles: 5 rounds of 205 programs, in parts of 6 and 2 columns 4 and 2.
    config = replace(choose_gemm(16384, 2048, HOPPER), programs=205)
    assert column_panels(16384, 2048, 16384, config) == ((0, 2048),)


def test_one_program_for_a_tile_is_not_split() -> None:
    assert column_panels(16384, 8192, 4096, pointer_gemm(64)) == ((0, 8192),)


# Apart from the product, H is a pass over X, whatever the layout of Y.
@pytest.mark.parametrize(
    ("layout", "fused"),
    [(layout, True) for layout in [(False, False), *LAYOUTS]]
    + [((False, False), False), ((True, True), False)],
    ids=str,
)
def test_both_ways_give_the_definition(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, layout: tuple[bool, bool], fused: bool
) -> None:
    # Panels of a few columns, on few tokens: what is computed is the same as of 256.
    replan(
        monkeypatch, "forward", panels=((0, 64), (64, 64), (128, 8)), tail_columns=0,
        on_activations=False, fused_low_rank=fused and not layout[1],
    )  # fmt: skip
    replan(monkeypatch, "backward", panels=((0, 64), (64, 8)))
    case = make_case((2, 40), 72, 136, block_size=1, r=5, device=kernel_device)
    assert_case_accurate(case, lambda c: run(*layout, c), compute=torch.float16)
    # Without a low rank there is no H to make in either way.
    if fused:
        replan(monkeypatch, "forward", fused_low_rank=False)
        without = replace(case, lora_a=None, lora_b=None)
        assert_case_accurate(without, lambda c: run(*layout, c), compute=torch.float16)
    recorded_calls.reset()
