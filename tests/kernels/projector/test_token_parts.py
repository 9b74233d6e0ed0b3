"""dY ⊙ s in the place of s ⊙ W: where tokens are few, in parts that bound its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices.backward_plan import BackwardPlan, choose_backward
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits, GemmConfig
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import make_case
from support.kernels.kernel_cases import assert_matches_fp64, replan, triton_linear, watch

LIMITS = DeviceLimits((9, 0), 132)


def plan_of(m: int, k: int, n: int, *, r_pad: int = 16, **changes: Any) -> BackwardPlan:
    options: dict[str, Any] = {
        "wants_t": True, "output_side": True, "through_weight": True, "bias": False,
        "channel_first": False, "limits": LIMITS, "scales": "either",
    }  # fmt: skip
    return choose_backward(m, n, k, r_pad, **options | changes)


# (M, K, N) -> (tokens of a part, µs of forward and backward with it, µs where s ⊙ W is made) on an
# H200, torch 2.11.0, triton 3.6.0, bf16, P = 1, r = 16. Where the first is None, no part paid.
MEASURED: dict[tuple[int, int, int], tuple[int | None, float, float]] = {
    (2048, 2560, 10240): (832, 438.3, 472.9),
    (2048, 2688, 10304): (768, 460.2, 450.4),
    (2048, 5120, 2560): (768, 247.2, 248.9),
    (2048, 4096, 16384): (1024, 937.5, 919.1),
    (2048, 8192, 4096): (512, 501.5, 512.3),
    (2048, 4096, 2688): (1024, 211.0, 211.8),
    (2048, 4096, 18560): (1024, 1039.4, 1084.4),
    (2048, 4096, 2048): (1024, 148.5, 149.1),
    (2048, 2048, 8512): (None, 330.3, 277.1),
    (512, 768, 3072): (None, 67.3, 36.8),
}


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_parts_as_they_were_measured(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    plan = plan_of(*shape)
    tokens, with_parts, with_weight = MEASURED[shape]
    if tokens is None:
        assert not plan.token_parts
        assert with_parts > 1.05 * with_weight
        return
    assert with_parts < 1.03 * with_weight
    assert plan.token_parts[0] == (0, tokens)
    ends = [first + size for first, size in plan.token_parts]
    assert [first for first, _ in plan.token_parts] == [0, *ends[:-1]]
    assert ends[-1] == m
    # At most 0.41 of what the layer returns, where s ⊙ W was up to 1.6 times that.
    assert 2 * n * tokens <= 0.41 * 2 * m * (n + k)
    assert 2 * tokens <= k
    # The output side runs beside them all; smaller tiles are for what is less than a part.
    assert plan.co_resident
    assert (plan.rest is not None) is (shape == (2048, 2560, 10240))
    if plan.rest is not None:
        assert plan.rest.block_n < plan.gemm.block_n


def test_so_few_tokens_at_once_whatever_their_tiles_fill() -> None:
    for m in (1, 64, 256, 640):
        for r_pad in (16, 64):
            assert plan_of(m, 2560, 10240, r_pad=r_pad).token_parts == ((0, m),)
    assert not plan_of(768, 2560, 10240).token_parts


def test_not_where_the_weight_is_smaller_or_nothing_was_measured() -> None:
    assert not plan_of(8192, 2048, 8192).token_parts
    for changes in (
        {"channel_first": True}, {"scales": "weight"}, {"scales": "nothing"},
        {"limits": DeviceLimits((8, 0), 108)},
        {"bias": True}, {"r_pad": 64}, {"through_weight": False},
    ):  # fmt: skip
        assert not plan_of(2048, 5120, 2560, **changes).token_parts


# All at once, by an even and by an odd number of parts, and each row by itself.
PARTS = [((0, 35),), ((0, 16), (16, 19)), ((0, 16), (16, 16), (32, 3))]


@pytest.mark.parametrize("co_resident", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("block_size", [1, 6])
def test_gradients_match_fp64(
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[tuple[int, int], ...],
    block_size: int,
    co_resident: bool,
) -> None:
    replan(
        monkeypatch, "backward", token_parts=parts, fused_low_rank=False, co_resident=co_resident,
        side_processors=0,
    )  # fmt: skip
    made: list[int] = []
    watch(monkeypatch, passes, "launch_scaled", lambda dy, *_, **__: made.append(len(dy)))
    case = make_case(35, 24, 40, block_size=block_size, r=5, device=kernel_device)
    for changes in ({}, {"bias": None}, {"lora_a": None, "lora_b": None}, {"blocks": None}):
        made.clear()
        assert_matches_fp64(replace(case, **changes), compute=torch.float16)
        assert made == [size for _, size in parts]
    for name in ("x", "blocks", "lora_a"):
        assert_matches_fp64(case, compute=torch.float16, trained=[name])
    recorded_calls.reset()


@pytest.mark.parametrize("r", [None, 5])
@pytest.mark.parametrize("k", [48, 44])
def test_scaled_rows_lie_where_later_results_will(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, k: int, r: int | None
) -> None:
    replan(
        monkeypatch, "backward", token_parts=((0, 15), (15, 12), (27, 8)), fused_low_rank=False,
        co_resident=False, side_processors=0,
    )  # fmt: skip
    within: list[bool] = []
    watch(
        monkeypatch, passes, "launch_gemm",
        lambda x, _, y, *, v_transposed, **__: v_transposed or within.append(
            x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        ),
    )  # fmt: skip
    case = make_case(35, k, 24, block_size=1, r=r or 1, device=kernel_device)
    case = case if r else replace(case, lora_a=None, lora_b=None)
    assert_matches_fp64(case, compute=torch.float16)
    # Behind an odd number of rows of 44 they would begin where the copy engine cannot.
    assert within == [k == 48, k == 48, False]
    recorded_calls.reset()


def test_other_tiles_for_the_last_part(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = GemmConfig(64, 128, 64, num_warps=4, num_stages=6, flatten=True, programs=2)
    replan(
        monkeypatch, "backward", token_parts=PARTS[2], rest=rest, fused_low_rank=False,
        co_resident=False, side_processors=0,
    )  # fmt: skip
    used: list[bool] = []
    watch(
        monkeypatch, passes, "launch_gemm",
        lambda *_, v_transposed, config, **__: v_transposed or used.append(config == rest),
    )  # fmt: skip
    assert_matches_fp64(
        make_case(35, 24, 40, block_size=6, r=5, device=kernel_device), compute=torch.float16
    )
    assert used == [False, False, True]
    recorded_calls.reset()


def test_rows_with_a_stride_and_two_runs(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replan(monkeypatch, "backward", token_parts=PARTS[1], fused_low_rank=False, side_processors=0)
    case = make_case(35, 24, 40, block_size=1, r=5, device=kernel_device)
    wide = torch.randn(35, 96, device=kernel_device, dtype=torch.float64)
    case = replace(case, grad_output=wide[:, 8:48])
    assert_matches_fp64(case, compute=torch.float16)
    case = case.cast(torch.float16, torch.float32)
    first, second = case.run(triton_linear), case.run(triton_linear)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    recorded_calls.reset()
