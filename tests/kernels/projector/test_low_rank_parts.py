"""L = X I by parts of its sums, in the read that makes U = X D_bᵀ or dY ⊙ s."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prodial_kernels.kernels.choices.tile_sizes import LowRankConfig
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import make_case
from support.kernels.kernel_cases import assert_matches_fp64, replan, triton_linear, watch

# One span, several, and the last of them cut; a step and two.
CONFIGS = [
    LowRankConfig(16, 64, 1), LowRankConfig(16, 16, 1), LowRankConfig(32, 16, 2, num_stages=2),
]  # fmt: skip
PARTS = ((0, 16), (16, 19))


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    recorded_calls.reset()


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What is launched by parts: (tokens, whether scaled)."""
    made: list[tuple[int, bool]] = []
    watch(
        monkeypatch, passes, "launch_low_rank_parts",
        lambda x, *_, **options: made.append((len(x), options.get("scaled") is not None)),
    )  # fmt: skip
    return made


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("diagonal", ["relu", "free"])
def test_in_both_directions(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, config: LowRankConfig, diagonal: str
) -> None:
    made = watched(monkeypatch)
    replan(
        monkeypatch, "forward", on_activations=True, fused_low_rank=False, panels=((0, 40),),
        tail_columns=0, low_rank=config,
    )  # fmt: skip
    replan(
        monkeypatch, "backward", token_parts=PARTS, fused_low_rank=False, side_processors=0,
        low_rank=config,
    )  # fmt: skip
    case = make_case(
        35, 24, 40, block_size=1, r=5, device=kernel_device, diagonal=diagonal
    )  # fmt: skip
    assert_matches_fp64(case, compute=torch.float16)
    assert made == [(35, True), (16, True), (19, True)]
    made.clear()
    assert_matches_fp64(replace(case, blocks=None, bias=None), compute=torch.float16)
    assert made == [(35, False), (16, True), (19, True)]
    made.clear()
    larger = make_case(35, 24, 40, block_size=6, r=17, device=kernel_device, diagonal=diagonal)
    assert_matches_fp64(larger, compute=torch.float16)
    assert made == [(35, False), (16, True), (19, True)]
    assert_matches_fp64(case, compute=torch.float16, trained=["lora_a"])
    assert_matches_fp64(case, compute=torch.float16, trained=["x"])


@pytest.mark.parametrize("side_processors", [0, 1])
def test_without_scaling(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, side_processors: int
) -> None:
    made = watched(monkeypatch)
    replan(
        monkeypatch, "backward", token_parts=(), fused_low_rank=False,
        side_processors=side_processors, co_resident=False, low_rank=CONFIGS[1],
    )  # fmt: skip
    case = make_case(35, 24, 40, block_size=6, r=17, device=kernel_device)
    assert_matches_fp64(case, compute=torch.float16)
    assert (35, False) in made


def test_two_runs_are_equal(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replan(
        monkeypatch, "backward", token_parts=PARTS, fused_low_rank=False, side_processors=0,
        low_rank=CONFIGS[1],
    )  # fmt: skip
    case = make_case(35, 24, 40, block_size=1, r=5, device=kernel_device)
    wide = torch.randn(35, 96, device=kernel_device, dtype=torch.float64)
    case = replace(case, grad_output=wide[:, 8:48])
    assert_matches_fp64(case, compute=torch.float16)
    case = case.cast(torch.float16, torch.float32)
    first, second = case.run(triton_linear), case.run(triton_linear)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
