"""``compute="fp8"`` on a GPU: both products against fp64, replays, captured graphs, edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prodial_kernels.kernels.fp8 import passes
from prodial_kernels.kernels.fp8.quantize import launch_quantize
from prodial_kernels.ops.fp8.rounding import round_to_fp8
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
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "n", "block_size", "r"),
    [
        ((1024,), 2048, 1536, 1, 16),  # the library's products, both ways
        ((8192,), 2048, 256, 8, 70),
        ((1000,), 768, 1536, 1, 16),  # the own one forward
        ((77,), 200, 75, 1, 4),
        ((1,), 2048, 1024, 16, 8),
    ],
    ids=str,
)
def test_output_and_gradients_match_fp64(
    tokens: Any, k: int, n: int, block_size: int, r: int, dtype: torch.dtype
) -> None:
    layer = stored(n, k, dtype, "cuda")
    case = fp8_case(layer, tokens, block_size=block_size, r=r)
    assert_case_accurate(case, runner(layer, impl="triton"), compute=dtype)


@pytest.mark.parametrize("rows", [1000, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_codes_are_those_of_the_definition(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 768, device="cuda").to(dtype)
    x[1] *= 1e-6
    x[2], x[3, 5], x[4, 7], x[5, 9] = 0, 1e4, float("inf"), float("nan")
    found, _ = launch_quantize(x)
    codes, scale = round_to_fp8(x)
    assert torch.equal(found.scales[:, :rows].T.nan_to_num(), scale.nan_to_num())
    finite = scale.repeat_interleave(128, 1).isfinite()
    assert torch.equal(found.codes.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])


@pytest.mark.parametrize("k", [768, 2048], ids=["own", "library"])
def test_replayed_and_captured_steps_are_bit_equal(k: int) -> None:
    layer = stored(1536, k, torch.bfloat16, "cuda")
    case = fp8_case(layer, 1024, r=16).cast(torch.bfloat16, torch.float32)
    taken = passes.by_library(1024, case.operands, case.x.device, towards_input=False)
    assert taken == (k == 2048 and torch.cuda.get_device_capability() == (9, 0))
    run = runner(layer, impl="triton")
    first, *others = [case.run(run) for _ in range(4)]
    replay, result = captured(lambda: case.run(run))
    replay()
    for other in (*others, result):
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("k", [768, 2048], ids=["own", "library"])
def test_what_is_not_finite_spoils_its_own_row_alone(k: int) -> None:
    layer = stored(256, k, torch.bfloat16, "cuda")
    case = fp8_case(layer, 64).cast(torch.bfloat16, torch.float32)
    run = runner(layer, impl="triton")
    clean = case.run(run)["output"]
    case.x[1, 3], case.x[33, 200] = float("inf"), float("nan")
    found = case.run(run)["output"]
    assert found[[1, 33]].isnan().all()
    others = [row for row in range(64) if row not in (1, 33)]
    assert torch.equal(found[others], clean[others])


def test_no_dense_weight_is_made() -> None:
    """The transient of a step is less than one 16-bit weight beside what it returns."""
    n, k, m = 4096, 4096, 128
    layer = stored(n, k, torch.bfloat16, "cuda")
    case = fp8_case(layer, m, r=16).cast(torch.bfloat16, torch.float32)
    run = runner(layer, impl="triton")
    case.run(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = case.run(run)
    held = sum(tensor.nbytes for tensor in results.values())
    assert torch.cuda.max_memory_allocated() - before - held < 1.5 * n * k
