"""A weight that is made in column panels, each in the memory of the one before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices.backward_plan import BackwardPlan, choose_backward
from prodial_kernels.kernels.choices.forward_plan import ForwardPlan, choose_forward, choose_gemm
from prodial_kernels.kernels.choices.panels import PANEL_BYTES, column_panels, two_panels
from prodial_kernels.kernels.choices.tile_sizes import (
    DeviceLimits,
    GemmConfig,
    pointer_gemm,
    tiles_of,
)
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import assert_case_accurate, make_case
from support.kernels.channel_first import LAYOUTS, run
from support.kernels.kernel_cases import replan, watch

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


def forward_of(m: int, k: int, n: int, **changes: Any) -> ForwardPlan:
    options: dict[str, Any] = {
        "r_pad": 16, "block_size": 1, "scale": True, "dropout": False, "x_channel_first": False,
        "y_channel_first": False, "aligned": True, "limits": HOPPER,
    }  # fmt: skip
    return choose_forward(m, n, k, **options | changes)


def backward_of(m: int, k: int, n: int, r_pad: int = 16, **changes: Any) -> BackwardPlan:
    options: dict[str, Any] = {
        "wants_t": True, "output_side": True, "through_weight": True, "bias": False,
        "channel_first": False, "limits": HOPPER, "scales": "either",
    }  # fmt: skip
    return choose_backward(m, n, k, r_pad, **options | changes)


def widths(plan: ForwardPlan | BackwardPlan) -> list[int]:
    assert [first for first, _ in plan.panels] == [
        sum(width for _, width in plan.panels[:i]) for i in range(len(plan.panels))
    ]
    return [width for _, width in plan.panels]


# (M, K, N) -> widths of the panels, µs of forward and backward with them and without, on an H200
# (torch 2.11.0, triton 3.6.0, bf16, P = 1, r = 16).
FORWARD_MEASURED: dict[tuple[int, int, int], tuple[list[int], float, float]] = {
    (8192, 4096, 2048): ([512, 1536], 483.9, 493.8),
    (16384, 4096, 2048): ([256, 1792], 898.0, 913.2),
    (8192, 8192, 4096): ([512, 512, 1024, 1024, 1024], 1765.4, 1788.3),
    (8192, 2048, 8192): ([3584, 3584, 1024], 893.5, 894.8),
    (16384, 768, 3072): ([3072], 308.2, 304.7),
    (2048, 5120, 2560): ([2048, 512], 238.7, 252.2),
    (2048, 4096, 2688): ([2688], 203.6, 196.1),
}


@pytest.mark.parametrize("shape", FORWARD_MEASURED, ids=str)
def test_a_first_panel_that_makes_h_as_it_was_measured(shape: tuple[int, int, int]) -> None:
    expected, with_it, without = FORWARD_MEASURED[shape]
    plan = forward_of(*shape)
    assert widths(plan) == expected
    taken = len(expected) > 1 and (plan.fused_low_rank or plan.rest is not None)
    assert taken is (with_it < without - 2)


def test_h_is_made_by_a_first_panel_only_where_a_product_can() -> None:
    shape = (8192, 4096, 2048)
    for changes in (
        {"dropout": True}, {"x_channel_first": True}, {"y_channel_first": True}, {"aligned": False},
        {"r_pad": 64}, {"r_pad": None}, {"limits": DeviceLimits((8, 0), 108)},
    ):  # fmt: skip
        assert len(forward_of(*shape, **changes).panels) == 1
    # What narrow tiles compute beside the others is of the last panel.
    beside = forward_of(8192, 4096, 2688)
    assert (widths(beside), beside.tail_columns) == ([512, 2176], 128)


# As above; ``None``: not measured, chosen for its memory.
BACKWARD_MEASURED: dict[tuple[int, int, int, int], tuple[list[int], float | None, float]] = {
    (8192, 2048, 8192, 16): ([512, 512, 1024], 887.8, 894.8),
    (8192, 2048, 8192, 64): ([512, 512, 1024], 941.9, 953.7),
    (16384, 2048, 8192, 16): ([256, 768, 1024], 1773.6, 1802.6),
    (8192, 4096, 18560, 16): ([512] * 8, 4030.3, 4127.2),
    (8192, 2688, 10304, 16): ([512, 512, 1024, 512, 128], 1379.8, 1442.9),
    (8192, 8192, 4096, 16): ([512, 1536, 2048, 2048, 2048], 1804.9, 1788.3),
    (8192, 4096, 2048, 16): ([2304, 1792], None, 493.8),
    (8192, 4096, 2688, 16): ([2304, 1792], None, 610.3),
    (16384, 768, 3072, 16): ([768], 308.6, 304.7),
}


@pytest.mark.parametrize("shape", BACKWARD_MEASURED, ids=str)
def test_panels_of_backward_as_they_were_measured(shape: tuple[int, int, int, int]) -> None:
    expected, with_them, without = BACKWARD_MEASURED[shape]
    m, k, n, _ = shape
    plan = backward_of(*shape)
    assert widths(plan) == expected
    if len(expected) > 1:
        # A wide result's costs nearly nothing, for a weight that would be a third of its memory.
        assert with_them is None or with_them < 1.01 * without
        assert 2 * n * max(expected) <= 0.12 * 2 * m * (n + k)
    sizes = [config.block_n for config in (plan.gemm, plan.rest) if config is not None]
    assert sizes == ([256, 128] if shape[:3] == (8192, 2688, 10304) else [256])
    # Without the LoRA term there is no T to make in the first.
    assert sum(widths(backward_of(*shape, wants_t=False))) == k


@pytest.mark.parametrize("m", [8192, 16384])
@pytest.mark.parametrize(
    ("k", "n"), [(2688, 10304), (4096, 2688), (4096, 18560), (8192, 4096), (2048, 8512)]
)
def test_of_many_tokens_no_scaled_weight_is_a_tenth_of_what_a_layer_returns(
    m: int, k: int, n: int
) -> None:
    plan = backward_of(m, k, n)
    assert 2 * n * max(widths(plan)) <= 0.12 * 2 * m * (n + k)


def test_two_panels_of_no_more_rounds() -> None:
    config = replace(choose_gemm(8192, 4096, HOPPER), programs=114)
    assert two_panels(8192, 4096, config) == (((0, 2304), (2304, 1792)), 116)
    assert two_panels(7168, 512, config) is None
    for m, features in ((64, 32), (64, 256), (16384, 32)):
        assert two_panels(m, features, config) is None
    for features in (257, 300, 512, 700, 2688):
        halves = two_panels(16384, features, config)
        assert halves is not None
        (_, first), (at, second) = halves[0]
        assert first > 0 < second
        assert (at, first + second) == (first, features)


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
    finer = GemmConfig(64, 64, 32, num_warps=4, programs=2)
    replan(
        monkeypatch, "forward", panels=((0, 64), (64, 64), (128, 8)), tail_columns=0,
        on_activations=False, fused_low_rank=fused and not layout[1],
        rest=finer if fused else None,
    )  # fmt: skip
    replan(monkeypatch, "backward", panels=((0, 64), (64, 8)), rest=finer)
    made: list[bool] = []
    watch(
        monkeypatch, passes, "launch_gemm",
        lambda *_, v_transposed, inner, **__: made.append(inner is not None) if v_transposed else 0,
    )  # fmt: skip
    case = make_case((2, 40), 72, 136, block_size=1, r=5, device=kernel_device)
    assert_case_accurate(case, lambda c: run(*layout, c), compute=torch.float16)
    # H is made once, by the first panel's product if by one.
    assert len(made) == 3
    assert made == [fused and not layout[1], False, False]
    # Without a low rank there is no H to make in either way.
    if fused:
        replan(monkeypatch, "forward", fused_low_rank=False)
        without = replace(case, lora_a=None, lora_b=None)
        assert_case_accurate(without, lambda c: run(*layout, c), compute=torch.float16)
    recorded_calls.reset()
