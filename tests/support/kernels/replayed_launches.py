"""Compares a replayed launch with one by Triton's JIT, byte by byte as the driver gets them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from prodial_kernels.kernels.fp8 import pipelined
from prodial_kernels.kernels.fp8.quantize import Rounded
from prodial_kernels.kernels.projector import (
    exact_scale,
    gemm,
    input_side,
    output_side,
    passes,
    prepare,
    reduce,
)
from prodial_kernels.kernels.projector.operands import Needs, ProjectionOptions
from prodial_kernels.kernels.replay import recorded_calls, recording
from support.kernels.stand_in_driver import STREAM, DriverLaunch, StandInDriver

KERNELS = (
    exact_scale._exact_scale_kernel, gemm._gemm_kernel, input_side._input_side_kernel,
    output_side._output_side_kernel, prepare._prepare_kernel, reduce._reduce_kernel,
    pipelined._pipelined_product_kernel,
)  # fmt: skip
M, K, N, R = 256, 96, 192, 16


def operands(channel_first: bool = False, p: int = 1) -> list[Tensor | None]:
    """X, W, D_a, s, A, B, no bias, no dropout."""
    x = torch.empty(2, K, M // 2) if channel_first else torch.empty(M, K)
    return [
        x.bfloat16(), torch.empty(N, K).bfloat16(), torch.empty(K // p, p, p), torch.empty(N),
        torch.empty(R, K), torch.empty(N, R), None, None,
    ]  # fmt: skip


@dataclass
class Call:
    """One call: what it was given and returned, and what reached the driver."""

    given: list[Tensor | None]
    results: list[Tensor | None]
    launches: list[DriverLaunch]


def both_ways(channel_first: bool, p: int, driver: StandInDriver) -> tuple[Call, Call]:
    """Run forward and backward once, each on operands of its own."""
    options = ProjectionOptions("triton", lora_scaling=1.0)
    given = operands(channel_first, p)
    length = M // 2 if channel_first else 0
    y, h = recorded_calls.replayed(passes.recorded_forward, given, (options, length))
    forward = Call(given, [y, h], driver.taken())
    assert y is not None
    given = [torch.empty_like(y), *given, y, h, None]
    needs = Needs(True, False, True, True, True, True, False)
    results = recorded_calls.replayed(passes.recorded_backward, given, (options, needs))
    return forward, Call(given, list(results), driver.taken())


def product_in_gluon(
    codes: Tensor, scales: Tensor, weight: Tensor, scale_inv: Tensor, low: Tensor, b: Tensor
) -> list[Tensor]:
    """The pipelined product in fp8, whose tensor descriptors are Gluon's."""
    y = low.new_empty(codes.shape[0], weight.shape[0])
    pipelined.launch_pipelined_product(
        Rounded(codes, scales), weight, scale_inv, y,
        config=pipelined.PipelinedConfig(unroll=4, programs=132), low=low, outer=b,
    )  # fmt: skip
    return [y]


def in_gluon(driver: StandInDriver) -> tuple[Call, ...]:
    """Run it once, on operands of its own."""
    fp8 = torch.float8_e4m3fn
    given: list[Tensor | None] = [
        torch.empty(M, 512, dtype=fp8), torch.empty(4, M), torch.empty(256, 512, dtype=fp8),
        torch.empty(2, 4), torch.empty(M, R, dtype=torch.bfloat16), torch.empty(256, R),
    ]  # fmt: skip
    return (
        Call(given, list(recorded_calls.replayed(product_in_gluon, given, ())), driver.taken()),
    )


def check(run: Callable[[StandInDriver], tuple[Call, ...]], driver: StandInDriver) -> None:
    """The second call is recorded, those after it are a recording's, each on other addresses."""
    run(driver)
    driver.learn(KERNELS)
    # All are held, so that no address comes back.
    runs = [run(driver) for _ in range(3)]
    for jit, *by_replay in zip(*runs, strict=True):
        for other in by_replay:
            check_same(jit, other)


def check_same(jit: Call, other: Call) -> None:
    """Everything is equal but the addresses, and they correspond."""
    pairs = {0: 0}
    for one, two in zip(jit.given + jit.results, other.given + other.results, strict=True):
        if one is not None and two is not None:
            assert one.data_ptr() != two.data_ptr()
            pairs[one.data_ptr()] = two.data_ptr()
    assert len(jit.launches) == len(other.launches) > 0
    for one, two in zip(jit.launches, other.launches, strict=True):
        assert one.setting == two.setting, (one.setting, two.setting)
        assert len(one.parameters) == len(two.parameters) > 2
        for (kind, at, rest), (kind_too, at_too, rest_too) in zip(
            one.parameters, two.parameters, strict=True
        ):
            assert (kind, rest) == (kind_too, rest_too)
            assert pairs.setdefault(at, at_too) == at_too, (kind, at, at_too)


def main() -> int:
    """Run every check; an AssertionError tells what is wrong."""
    # What the driver is given does not depend on how well the code is optimised.
    knobs.nvidia.disable_ptxas_opt = True
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(recorded_calls, "replayable", return_value=True),
        mock.patch.object(recording, "current_handle", return_value=STREAM),
    ):
        driver = StandInDriver(Path(folder))
        for channel_first, p in ((False, 1), (True, 12)):
            check(partial(both_ways, channel_first, p), driver)
        check(in_gluon, driver)
        assert not recorded_calls.obstacles(), recorded_calls.obstacles()
        counts = recorded_calls.counts()
        assert (counts["replayed"], counts["run"]) == (5, 0), counts
    return 0


if __name__ == "__main__":
    sys.exit(main())
