"""How backward divides a Hopper, against what plans were measured to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices.backward_plan import BackwardPlan, choose_backward
from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import (
    DeviceLimits,
    choose_input_side,
    choose_output_side,
    tiles_of,
)
from prodial_kernels.kernels.projector import output_side, passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import assert_case_accurate, make_case
from support.kernels.kernel_cases import replan, triton_linear, watch

PROCESSORS = 132
SHARED = -1  # the output side is co-resident with the product on every multiprocessor
# (tile, whether T is fused, multiprocessors of the output side) -> µs of backward on an H100
# 80GB HBM3, torch 2.11.0, triton 3.6.0, bf16, P = 1: the fastest plans and, of others, the best.
# Co-resident with wide tiles was measured later; its share of what was the fastest before.
MEASURED: dict[tuple[int, int, int, int, bool], dict[tuple[str, bool, int], float]] = {
    (2048, 2048, 8512, 16, False): {
        ("128x256", True, SHARED): 165.2, ("64x256", True, SHARED): 174.0,
        ("128x256", True, 0): 185.0, ("64x256", True, 0): 191.3, ("128x256", False, 0): 198.1,
        ("64x256", False, 46): 202.3,
    },
    (2048, 4096, 2048, 16, False): {
        ("128x256", True, SHARED): 96.3, ("64x256", True, SHARED): 97.9,
        ("64x256", False, 29): 102.8,
        ("64x256", True, 29): 103.4, ("128x256", False, 46): 103.9, ("128x256", True, 0): 104.0,
        ("128x256", False, 0): 105.5,
    },
    (2048, 1536, 768, 16, False): {
        ("128x256", True, 36): 32.0, ("64x256", True, 36): 32.2, ("64x256", True, SHARED): 34.6,
        ("64x256", False, 68): 37.2,
    },
    (2048, 768, 3072, 16, False): {
        ("64x256", True, SHARED): 41.2, ("64x256", True, 36): 44.2,
    },
    (8192, 4096, 2048, 16, False): {
        ("128x256", False, 18): 303.7, ("128x256", False, 29): 326.5, ("128x256", False, 0): 328.8,
        ("128x256", True, 18): 331.7,
    },
    (8192, 2048, 8192, 16, False): {
        ("128x256", True, SHARED): 519.0, ("128x256", False, 29): 543.0,
        ("64x256", True, 18): 573.9,
        ("64x256", False, 18): 588.8, ("128x256", False, 0): 603.8, ("128x256", True, 29): 627.4,
    },
    (16384, 1536, 768, 16, False): {
        ("128x256", True, 22): 138.2, ("128x256", False, 36): 140.1, ("128x256", False, 22): 146.0,
        ("128x256", True, 36): 148.4,
    },
    (16384, 768, 3072, 16, False): {
        ("128x256", True, SHARED): 186.5, ("128x256", True, 36): 200.4,
        ("128x256", False, 55): 225.2, ("64x256", True, 36): 226.3, ("128x256", False, 36): 239.4,
    },
    (16384, 4096, 2048, 16, False): {
        ("128x256", False, 11): 593.1, ("128x256", False, 18): 607.7, ("128x256", False, 0): 644.9,
        ("128x256", True, 11): 654.1, ("128x256", True, SHARED): 663.0,
    },
    (4096, 1024, 4096, 16, False): {
        ("128x256", True, SHARED): 83.7, ("64x256", True, SHARED): 99.0,
        ("64x256", True, 46): 100.0,
    },
    (8192, 768, 3072, 16, False): {
        ("128x256", True, 36): 107.6, ("128x256", True, SHARED): 117.5,
        ("64x256", True, SHARED): 119.7,
    },
    (4096, 1024, 2048, 16, False): {
        ("128x256", True, SHARED): 50.4, ("64x256", True, SHARED): 58.1, ("64x256", True, 46): 70.9,
    },
    (4096, 1536, 768, 16, False): {
        ("128x256", True, 36): 44.7, ("64x256", True, SHARED): 46.9,
        ("128x256", True, SHARED): 48.0,
    },
    (8192, 1536, 768, 16, False): {
        ("128x256", True, SHARED): 74.5, ("128x256", False, 36): 75.3,
    },
    (8192, 2048, 4096, 16, False): {
        ("128x256", False, 29): 297.8, ("128x256", True, SHARED): 304.1,
    },
    (16384, 1024, 2048, 16, False): {
        ("128x256", True, SHARED): 179.2, ("128x256", False, 29): 185.0,
    },
    (16384, 1024, 4096, 16, False): {
        ("128x256", True, SHARED): 318.3, ("128x256", False, 29): 341.0,
    },
    (65536, 768, 3072, 16, False): {
        ("128x256", True, SHARED): 744.3, ("128x256", True, 29): 807.1,
    },
    (2048, 4096, 2048, 16, True): {
        ("64x256", False, 29): 108.9, ("128x256", False, 46): 109.8, ("128x256", False, 0): 110.1,
        ("64x256", False, 0): 113.4,
    },
    (2048, 2048, 8512, 64, False): {
        ("128x256", True, 0): 210.1, ("64x256", True, 0): 216.8, ("128x256", False, 68): 234.5,
        ("64x256", False, 46): 241.9,
    },
    (16384, 768, 3072, 64, False): {
        ("128x256", True, 36): 225.3, ("64x256", True, 36): 252.9, ("128x256", True, 55): 257.3,
    },
    (16384, 1536, 768, 64, False): {
        ("128x256", True, 22): 162.8, ("128x256", True, 36): 174.5, ("128x256", True, 0): 182.3,
    },
}  # fmt: skip


def plan_of(
    m: int, k: int, n: int, r_pad: int, channel_first: bool, **changes: Any
) -> BackwardPlan:
    options: dict[str, Any] = {
        "wants_t": True, "output_side": True, "through_weight": True, "bias": False,
        "channel_first": channel_first, "limits": DeviceLimits((9, 0), PROCESSORS),
    }  # fmt: skip
    return choose_backward(m, n, k, r_pad, **options | changes)


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_the_plan_is_the_fastest_measured_or_close(
    shape: tuple[int, int, int, int, bool],
) -> None:
    plan = plan_of(*shape)
    tile = f"{plan.gemm.block_m}x{plan.gemm.block_n}"
    measured = MEASURED[shape]
    side = SHARED if plan.co_resident else plan.side_processors
    assert measured[tile, plan.fused_low_rank, side] <= 1.03 * min(measured.values())


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_a_shared_device_is_shared_without_rest(
    shape: tuple[int, int, int, int, bool],
) -> None:
    plan = plan_of(*shape)
    if not plan.side_processors:
        # Alone, two of its programs share a multiprocessor.
        pairs = not plan.co_resident and plan.output_side.num_warps == 4
        assert plan.gemm.programs == PROCESSORS
        assert plan.output_side.programs == PROCESSORS * (2 if pairs else 1)
        return
    assert plan.output_side.programs == plan.side_processors
    assert plan.gemm.programs == PROCESSORS - plan.side_processors
    # A multiprocessor fewer on the side would not spare the product a round.
    m, k, *_, channel_first = shape
    tiles = tiles_of(plan.gemm, *((k, m) if channel_first else (m, k)))
    rounds = ceil_div(tiles, plan.gemm.programs)
    assert ceil_div(tiles, rounds) == plan.gemm.programs


def test_what_is_not_asked_for_takes_no_processors() -> None:
    shape = (2048, 768, 3072, 16, False)
    nothing = plan_of(*shape, output_side=False, wants_t=False)
    assert (nothing.side_processors, nothing.gemm.programs) == (0, PROCESSORS)
    assert plan_of(*shape, through_weight=False).side_processors == 0
    assert not plan_of(*shape, wants_t=False).fused_low_rank
    assert not plan_of(2048, 768, 3072, 128, False).fused_low_rank
    assert not plan_of(2048, 768, 3072, 16, True).fused_low_rank
    assert not plan_of(2048, 2048, 8512, 16, False, output_side=False).co_resident


def test_the_output_side_is_co_resident_with_the_product_only_where_it_fits() -> None:
    shape = (2048, 2048, 8512)
    assert plan_of(*shape, 16, False).co_resident
    # More sums than the registers left, or no tile that T is fused into.
    assert not plan_of(*shape, 32, False).co_resident
    assert not plan_of(*shape, 16, False, bias=True).co_resident
    assert not plan_of(*shape, 16, True).co_resident


@pytest.mark.parametrize("co_resident", [False, True])
def test_a_co_resident_output_side_is_launched_after_the_product(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, co_resident: bool
) -> None:
    order = []
    for module, name in (
        (passes, "gemm"), (output_side, "output_side"), (output_side, "exact_scale"),
    ):  # fmt: skip

        def see(*args: Any, name: str = name, **options: Any) -> None:
            order.append(name)

        watch(monkeypatch, module, f"launch_{name}", see)

    replan(monkeypatch, "backward", side_processors=0, co_resident=co_resident)
    case = make_case(40, 48, 32, block_size=1, r=4, device=kernel_device)
    assert_case_accurate(case, triton_linear, compute=torch.float16)
    recorded_calls.reset()
    sums = ["output_side", "exact_scale"]
    assert order == ["gemm", *(["gemm", *sums] if co_resident else [*sums, "gemm"])]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_other_devices_run_in_turn_without_the_copy_engine(capability: tuple[int, int]) -> None:
    plan = plan_of(2048, 768, 3072, 16, False, limits=DeviceLimits(capability, PROCESSORS))
    assert (plan.side_processors, plan.gemm.tma, plan.output_side.tma) == (0, False, False)


@pytest.mark.parametrize("programs", [4, 24, 132])
@pytest.mark.parametrize(("m", "n"), [(2048, 768), (2048, 8512), (16384, 3072), (1, 64)])
def test_no_other_number_of_splits_takes_fewer_rounds_of_tiles(
    m: int, n: int, programs: int
) -> None:
    options: dict[str, Any] = {"bias": False, "capability": (9, 0), "programs": programs}
    config = choose_output_side(m, n, 16, **options)
    columns, tiles = ceil_div(n, config.block_n), ceil_div(m, config.block_m)

    def longest(items: int) -> float:
        # One program walks this many tiles, and begins and ends a sum for each item.
        each = ceil_div(tiles * columns, items)
        return ceil_div(items, programs) * (each + 5)

    # Few parts are preferred at equal cost, at most one tile's worth.
    best = min(longest(columns * splits) for splits in range(1, 33))
    assert longest(config.items) <= best + 1.6
    assert config == replace(config, programs=programs)


@pytest.mark.parametrize(
    ("m", "k", "rows", "programs", "stages"),
    [
        (2048, 768, 32, 132, 3), (2048, 1536, 32, 264, 3), (2048, 2560, 32, 264, 4),
        (16384, 768, 64, 264, 3), (2048, 4096, 64, 264, 3),
    ],
)  # fmt: skip
def test_short_walks_over_the_inputs_take_fewer_rows_programs_or_stages(
    m: int, k: int, rows: int, programs: int, stages: int
) -> None:
    config = choose_input_side(m, k, 16, 1, dropout=False, channel_first=False, capability=(9, 0))
    assert (config.block_m, config.programs, config.num_stages) == (rows, programs, stages)
