"""The launches that the kernels can choose, compiled to machine code without a GPU.

What a launch holds on the chip is known only once it is compiled: too much shared memory is an
error at run time, registers that do not fit spill to memory and cost the speed they were meant to
give, and triton 3.6.0's assembler can miscompile a Hopper product (wgmma) whose operand A is in
registers. Here a choice that covers every constant of every kernel is compiled, and with a device
every pair of constants; ``compile_launches.py --cover all`` compiles all, in ten minutes an
architecture.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices.tile_sizes import COMPILED_FOR
from support.kernels.compile_kernels import ARCHITECTURES
from support.kernels.compile_launches import (
    BLACKWELL,
    CHECKED,
    HOPPER,
    IN_TENSOR_MEMORY,
    PRODUCTS,
)
from support.kernels.uninterpreted import run_uninterpreted

# Bytes a thread may spill, where that was measured to be faster than what does not spill: on an
# H100 at rank 64, a projector's step took 395 µs so and 474 without, at M, K, N = 16384, 768, 3072.
# What L = X Aᵀ of a channel-first X spills at rank 64 on sm_90 (8 bytes, triton 3.9.0) has not been
# measured against other tiles.
SPILLS = {("_output_side_kernel", 64): 80, ("_prepare_kernel", 64): 8}
# On sm_100 a product of rank 64 in fp16, on sm_120 three launches of wide blocks or ranks spill a
# little (triton 3.9.0). Nothing has been measured there, so they are left as they are.
SPILLS_ELSEWHERE = {100: {("_gemm_kernel", 64): 16}}
SPILLS_OF_ALL = {120: 64}


def rank_of(cost: dict[str, Any]) -> int | None:
    """The padded rank in a launch's title."""
    found = re.search(r"\bRANK=(\d+)", cost["title"])
    return None if found is None else int(found[1])


def allowed_from_registers(cost: dict[str, Any]) -> int:
    """How many wgmma may take A from registers: none but of a product with a fused low-rank one.

    That hands L on to one product behind its loop, in slices of 16, or zeros where nothing becomes
    of L, and awaits it at once; flattened loops hold it twice. test_every_launch.py runs each.
    """
    if cost["kernel"] != "_gemm_kernel" or re.search(r" without \S*inner", cost["title"]):
        return 0
    return 2 * (rank_of(cost) or 0) // 16


def broken(cost: dict[str, Any]) -> list[str]:
    """What a launch takes that it may not."""
    wrong = []
    if cost["error"]:
        wrong.append(cost["error"])
    if cost["shared"] > cost["shared_limit"]:
        wrong.append(f"shared memory {cost['shared']} > {cost['shared_limit']}")
    launch = (cost["kernel"], rank_of(cost))
    spills = SPILLS | SPILLS_ELSEWHERE.get(cost["arch"], {})
    if cost["local"] > spills.get(launch, SPILLS_OF_ALL.get(cost["arch"], 0)):
        wrong.append(f"spills {cost['local']} bytes")
    if cost["scratch"]:
        wrong.append(f"needs an allocator for {cost['scratch']} bytes")
    if cost["register_a"] > allowed_from_registers(cost):
        wrong.append(f"{cost['register_a']} wgmma take A from registers")
    return wrong


def test_every_architecture_that_auto_takes_is_compiled_here() -> None:
    assert set(CHECKED) == {10 * major + minor for major, minor in COMPILED_FOR}
    assert set(ARCHITECTURES) == set(CHECKED)


def test_launches_fit_the_device(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run_uninterpreted(tmp_path, "compile_launches.py", "--tests", "--json", str(figures))
    bad, *costs = json.loads(figures.read_text())
    # Its second product takes A from registers, and it spills besides: all of it is recognised.
    assert bad["error"] == ""
    assert 0 < bad["register_a"] < bad["wgmma"]
    assert bad["local"] > 0
    assert bad["shared"] > 0
    assert broken(bad)
    of_each = {arch: [cost for cost in costs if cost["arch"] == arch] for arch in CHECKED}
    kernels = {cost["kernel"] for cost in costs}
    assert kernels > PRODUCTS
    for arch in CHECKED:
        assert {cost["kernel"] for cost in of_each[arch]} == kernels, arch
    assert min(len(of_each[HOPPER]), len(of_each[BLACKWELL])) >= 30
    # Else the patterns that find them have gone stale with a new compiler.
    assert any(cost["wgmma"] for cost in of_each[HOPPER])
    own = {cost["kernel"] for cost in of_each[BLACKWELL] if cost["tcgen05"]}
    assert own == IN_TENSOR_MEMORY
    assert_all_fit(costs)


@pytest.mark.gpu
def test_pairs_of_constants_fit_this_device(tmp_path: Path) -> None:
    """Most rules are about what products of matrices hold on the chip, by two sizes together."""
    major, minor = torch.cuda.get_device_capability()
    arch, figures = 10 * major + minor, tmp_path / "figures.json"
    run_uninterpreted(
        tmp_path, "compile_launches.py", "--arch", str(arch), "--cover", "products", "--quick",
        "--jobs", str(min(8, os.cpu_count() or 1)), "--json", str(figures),
    )  # fmt: skip
    costs = json.loads(figures.read_text())
    assert len(costs) > 60
    assert {cost["arch"] for cost in costs} == {arch}
    assert_all_fit(costs)


def assert_all_fit(costs: list[dict[str, Any]]) -> None:
    wrong = [(cost, what) for cost in costs for what in broken(cost)]
    listed = "\n".join(f"{cost['title']} [{cost['origin']}]: {what}" for cost, what in wrong)
    assert not wrong, f"{len(wrong)} of {len(costs)} launches:\n{listed}"
