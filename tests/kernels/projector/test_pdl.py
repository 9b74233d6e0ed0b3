"""Programmatic dependent launch: which launches use it, and that they wait."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices.backward_plan import choose_backward
from prodial_kernels.kernels.choices.forward_plan import applies_to_activations
from prodial_kernels.kernels.choices.partition import fold_programs
from prodial_kernels.kernels.choices.tile_sizes import (
    TALL,
    WIDE,
    DeviceLimits,
    pdl_pays,
    pointer_gemm,
)
from prodial_kernels.kernels.projector.pdl import supports_pdl
from support.kernels.uninterpreted import run_uninterpreted

HOPPER = DeviceLimits((9, 0), 132)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What launch_order.py writes."""
    folder = tmp_path_factory.mktemp("order")
    run_uninterpreted(folder, "launch_order.py", str(folder / "found.json"))
    return json.loads((folder / "found.json").read_text())


def test_pdl_is_only_what_follows_a_launch_that_triggers_it(found: dict[str, Any]) -> None:
    for name, steps in found["orders"]["90"].items():
        for before, step in zip(
            [{"name": "nothing", "triggers": False}, *steps], steps, strict=False
        ):
            assert step["pdl"] == (step["waits"] or step["beside"]), (name, step)
            assert not (step["waits"] and step["beside"]), (name, step)
            if step["pdl"]:
                assert not step["side"], (name, step)
                assert before["triggers"], (
                    f"{name}: {step['name']} is a PDL launch behind {before['name']}"
                )
            # Else what is two launches behind would not be known to have ended. What waits at its
            # end may trigger: it does not end before the launch before it.
            assert not (step["waits"] and step["triggers"]), (name, step)


def test_no_other_device_has_such_launches(found: dict[str, Any]) -> None:
    for arch in ("80", "100"):
        for name, steps in found["orders"][arch].items():
            assert steps, name
            assert not [step for step in steps if step["triggers"] or step["pdl"] or step["waits"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("side by side", ["gemm", "gemm", "reduce"]),
        ("co-resident", ["gemm", "reduce"]),
        # Forward's tall tiles are behind L; and a join lies between the input side and reduce.
        ("deferred", ["gemm"]),
        ("many tokens", ["gemm", "gemm", "reduce"]),
        ("small weight", ["gemm", "tile_sums", "reduce"]),
        ("small weight, only s", ["gemm", "reduce"]),
    ],
)
def test_the_launches_that_gain_use_pdl(
    found: dict[str, Any], name: str, expected: list[str]
) -> None:
    steps = found["orders"]["90"][name]
    assert [step["name"] for step in steps if step["pdl"]] == expected


def test_the_code_waits_and_triggers_before_it_touches_memory(found: dict[str, Any]) -> None:
    assert found["code"] == {
        "waits": {"_gemm_kernel": True, "_reduce_kernel": True},
        "triggers": {"_prepare_kernel": True, "_input_side_kernel": True},
    }


def test_what_is_co_resident_with_the_product_fits_beside_one_of_its_programs(
    found: dict[str, Any],
) -> None:
    """Else it would wait until the product ends: slower, and nothing else would tell."""
    assert len(found["room"]) == 6
    for kernel, left in found["room"].items():
        assert min(left.values()) >= 0, (kernel, left)


def test_a_deferred_join_is_behind_the_input_side(found: dict[str, Any]) -> None:
    steps = [step["name"] for step in found["orders"]["90"]["deferred"]]
    assert steps[-3:] == ["input_side", "join", "reduce"]
    steps = [step["name"] for step in found["orders"]["90"]["side by side"]]
    assert steps[-3:] == ["join", "input_side", "reduce"]


def test_the_output_side_begins_with_the_first_panel_of_the_product(found: dict[str, Any]) -> None:
    steps = found["orders"]["90"]["column panels"]
    last_fork = max(at for at, step in enumerate(steps) if step["name"] == "fork")
    steps = steps[last_fork:]
    assert [step["name"] for step in steps[:4]] == ["fork", "gemm", "output_side", "exact_scale"]
    main = [step["name"] for step in steps if not step["side"]]
    later = ["prepare", "gemm"] * 2
    assert main == ["fork", "gemm", *later, "join", "input_side", "reduce"]


@pytest.mark.parametrize(
    ("rows", "k", "block_size", "beside_low", "programs", "pays"),
    [
        (768, 1536, 1, False, 576, True),
        (2048, 4096, 1, False, 4096, True),
        (8192, 2048, 1, False, 8192, False),
        (768, 1536, 24, False, 768, True),
        (3072, 768, 24, False, 1536, False),
        (33, 96, 96, False, 2, True),
        (1024, 768, 1, True, 96, True),
        (2048, 768, 1, True, 192, True),
        (2048, 1024, 1, True, 256, False),
    ],
)
def test_tall_tiles_use_pdl_behind_few_programs(
    rows: int, k: int, block_size: int, beside_low: bool, programs: int, pays: bool
) -> None:
    assert fold_programs(rows, k, block_size, beside_low=beside_low) == programs
    options: dict[str, Any] = {
        "block_size": block_size, "beside_low": beside_low, "processors": 132,
    }  # fmt: skip
    assert pdl_pays(TALL, programs, **options) == pays
    assert pdl_pays(WIDE, programs, **options)
    assert not pdl_pays(pointer_gemm(64), 1, **options)


def test_the_input_side_waits_unless_the_output_side_takes_longer_than_the_product() -> None:
    options: dict[str, Any] = {
        "wants_t": True, "output_side": True, "through_weight": True, "bias": False,
        "channel_first": False, "limits": HOPPER,
    }  # fmt: skip
    assert choose_backward(2048, 3072, 768, 64, **options).deferred
    for shape in ((2048, 768, 1536), (16384, 768, 1536), (16384, 3072, 768)):
        for r_pad in (16, 64):
            assert not choose_backward(*shape, r_pad, **options).deferred


@pytest.mark.parametrize(
    ("m", "fused", "applies"), [(2048, True, False), (1024, True, True), (2048, False, True)]
)
def test_blocks_apply_to_fewer_activations_where_h_could_be_fused(
    m: int, fused: bool, applies: bool
) -> None:
    options: dict[str, Any] = {"blocks": True, "scale": True, "channel_first": False}
    assert applies_to_activations(m, 3072, **options, fused_low_rank=fused) == applies


def test_no_pdl_where_there_is_no_device(kernel_device: str) -> None:
    operand = torch.empty(1, device=kernel_device)
    assert supports_pdl((9, 0), operand) == operand.is_cuda
    assert not supports_pdl((8, 0), operand)
