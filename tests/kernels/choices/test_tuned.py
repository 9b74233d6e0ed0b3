"""The table of tuned launches, as the launchers read it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices import tuned
from prodial_kernels.kernels.choices.backward_plan import BackwardPlan, choose_backward
from prodial_kernels.kernels.choices.tile_sizes import GemmConfig
from prodial_kernels.kernels.projector import input_sums, output_sums, passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case
from support.kernels.kernel_cases import triton_linear, watch

M, K, N, R = 40, 48, 32, 4


def run_and_watch(
    monkeypatch: pytest.MonkeyPatch, case: LinearCase, entries: dict[str, dict[str, Any]]
) -> dict[str, list[Any]]:
    """Run forward and backward with a table of these entries; return the configurations used."""
    family = tuned.device_family(**passes.device_limits(case.x.device))
    table = {
        tuned.key_of(kernel, family, M, N, K, 16, "float16"): entry
        for kernel, entry in entries.items()
    }
    monkeypatch.setattr(passes, "tuned", partial(tuned.tuned, table=table))
    recorded_calls.forget()
    used: dict[str, list[Any]] = {}
    for module, name in (
        (passes, "launch_gemm"), (output_sums, "launch_output_side"),
        (input_sums, "launch_input_side"),
    ):  # fmt: skip

        def see(*args: Any, name: str = name, **options: Any) -> None:
            used.setdefault(name, []).append(options["config"])

        watch(monkeypatch, module, name, see)
    assert_case_accurate(case, triton_linear, compute=torch.float16)
    recorded_calls.forget()
    return used


def test_an_entry_rules_the_launches_of_its_shape(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(M, K, N, block_size=1, r=R, device=kernel_device)
    entries = {
        "forward_gemm": {"block_n": 64, "num_stages": 2},
        "backward": {"gemm.block_k": 32, "output_side.block_m": 32, "side_processors": 2},
        "input_side": {"block_m": 16},
    }
    used = run_and_watch(monkeypatch, case, entries)
    forward, backward = used["launch_gemm"]
    assert (forward.block_n, forward.num_stages) == (64, 2)
    processors = passes.device_limits(case.x.device)["processors"]
    assert (backward.block_k, backward.programs) == (32, processors - 2)
    (output_side,) = used["launch_output_side"]
    assert (output_side.block_m, output_side.programs) == (32, 2)
    assert {config.block_m for config in used["launch_input_side"]} == {16}


def test_a_channel_first_layer_keeps_the_rules(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case((2, M // 2), K, N, block_size=1, r=R, device=kernel_device)
    given = run_and_watch(monkeypatch, case, {"forward_gemm": {"num_stages": 2}})
    assert given["launch_gemm"][0].num_stages == 2
    x = case.x.half().mT.contiguous()
    operands = [None if t is None else t.half() for t in (case.weight,)]
    passes.forward(
        x, *operands, None, None, None, None, None, None, 1.0, 0.0, True, 0
    )  # fmt: skip
    assert given["launch_gemm"][-1].num_stages != 2


def test_a_plan_shares_the_device_out() -> None:
    limits = {"capability": (9, 0), "processors": 132}
    options = {"wants_t": True, "output_side": True, "through_weight": True, "bias": False}
    plan = choose_backward(16384, 768, 1536, 16, **options, channel_first=False, **limits)
    assert plan.side_processors
    assert plan.gemm.programs + plan.output_side.programs == 132
    alone = BackwardPlan(GemmConfig(programs=132), plan.output_side, True, 0)
    assert alone.on(132) is alone
