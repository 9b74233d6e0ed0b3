"""``compute="fp8"`` without a bias on a GPU: dY is rounded in the read that makes the sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prodial_kernels.testing import assert_case_accurate
from support.captured.on_device import captured
from support.fp8.layers import fp8_case, stored
from support.quantized_layers import runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        reason="fp8 tensor cores come with Ada (sm_89)",
    ),
]


@pytest.mark.parametrize(
    ("tokens", "k", "n", "block_size", "r"),
    [
        (8192, 2048, 1024, 1, 16),
        (8192, 2048, 1024, 8, 40),
        (4100, 512, 384, 1, 32),
        (33, 256, 128, 16, 4),
    ],
)
def test_output_and_gradients_match_fp64(
    tokens: int, k: int, n: int, block_size: int, r: int
) -> None:
    layer = stored(n, k, torch.bfloat16, "cuda")
    case = replace(fp8_case(layer, tokens, block_size=block_size, r=r), bias=None)
    assert_case_accurate(case, runner(layer, impl="triton"), compute=torch.bfloat16)


def test_a_scale_of_every_sign_and_a_large_lora_term() -> None:
    """s = 0 and s < 0 are scales like others; where the LoRA term outgrows W x, ds is exact."""
    layer = stored(1024, 2048, torch.bfloat16, "cuda")
    case = replace(fp8_case(layer, 8192, r=16), bias=None)
    assert case.scale is not None
    assert case.lora_b is not None
    case.scale[5], case.scale[6] = 0, -1.5
    case.lora_b[40:44] *= 100
    assert_case_accurate(case, runner(layer, impl="triton"), compute=torch.bfloat16)


def test_replayed_and_captured_steps_are_bit_equal() -> None:
    layer = stored(1024, 2048, torch.bfloat16, "cuda")
    case = replace(fp8_case(layer, 8192, r=16), bias=None).cast(torch.bfloat16, torch.float32)
    run = runner(layer, impl="triton")
    first, *others = [case.run(run) for _ in range(4)]
    replay, result = captured(lambda: case.run(run))
    replay()
    for other in (*others, result):
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_what_is_not_finite_spoils_its_own_row_alone() -> None:
    layer = stored(1024, 2048, torch.bfloat16, "cuda")
    case = replace(fp8_case(layer, 8192), bias=None).cast(torch.bfloat16, torch.float32)
    run = runner(layer, impl="triton")
    clean = case.run(run)["output"]
    case.x[1, 3], case.x[33, 200], case.x[34] = float("inf"), float("nan"), 0
    found = case.run(run)["output"]
    assert found[[1, 33]].isnan().all()
    assert not found[34].any()
    rows = torch.ones(8192, dtype=torch.bool, device="cuda")
    rows[[1, 33, 34]] = False
    assert torch.equal(found[rows], clean[rows])
