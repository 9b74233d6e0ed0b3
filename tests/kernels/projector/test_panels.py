"""A weight that is made in parts, each in the memory of the one before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices import tile_sizes
from prodial_kernels.kernels.choices.tile_sizes import (
    PANEL_BYTES,
    choose_gemm,
    panels,
    pointer_gemm,
    tiles_of,
)
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import assert_case_accurate, make_case
from support.kernels.channel_first import LAYOUTS, run
from support.kernels.kernel_cases import watch

HOPPER: dict[str, Any] = {"capability": (9, 0), "processors": 132}


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(16384, 2048, 8192), (8192, 2048, 8192), (8192, 4096, 16384), (16384, 5120, 20480)],
)
def test_parts_are_small_and_take_no_more_rounds(m: int, k: int, n: int) -> None:
    config = choose_gemm(m, n, **HOPPER)
    parts = panels(m, n, 2 * k, config)
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
    assert panels(m, n, 2 * k, choose_gemm(m, n, **HOPPER)) == [(0, n)]


def test_parts_that_take_more_rounds_are_not() -> None:
    # 8 columns of 128 tiles: 5 rounds of 205 programs, in parts of 6 and 2 columns 4 and 2.
    config = replace(choose_gemm(16384, 2048, **HOPPER), programs=205)
    assert panels(16384, 2048, 16384, config) == [(0, 2048)]


def test_one_program_for_a_tile_is_not_split() -> None:
    assert panels(16384, 8192, 4096, pointer_gemm(64)) == [(0, 8192)]


@pytest.mark.parametrize("rides", [True, False])
@pytest.mark.parametrize("layout", [(False, False), *LAYOUTS], ids=str)
def test_both_ways_give_the_definition(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, layout: tuple[bool, bool], rides: bool
) -> None:
    monkeypatch.setattr(tile_sizes, "PANEL_TOKENS", 64)
    monkeypatch.setattr(tile_sizes, "PANEL_BYTES", 2 * 256 * 264)
    monkeypatch.setattr(tile_sizes, "_PANEL_COST", 10.0)
    monkeypatch.setattr(passes, "rides_forward", lambda *args, **options: rides)
    seen = []
    watch(monkeypatch, passes, "panels", lambda *args: seen.append(len(panels(*args))))
    recorded_calls.forget()
    case = make_case((2, 272), 264, 528, block_size=1, r=5, device=kernel_device)
    for part in ({}, {"lora_a": None, "lora_b": None}):
        assert_case_accurate(
            replace(case, **part), lambda c: run(*layout, c), compute=torch.float16
        )
    recorded_calls.forget()
    assert set(seen) == {2, 3}  # along K and along N
