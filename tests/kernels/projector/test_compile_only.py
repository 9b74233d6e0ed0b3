"""The launches that the kernels can choose, compiled to machine code without a GPU.

What a launch holds on the chip is known only once it is compiled: too much shared memory is an
error at run time, registers that do not fit spill to memory and cost the speed they were meant to
give, and triton 3.6.0's assembler can miscompile a Hopper product (wgmma) whose operand A is in
registers. Here a choice that covers every constant of every kernel is compiled;
``compile_launches.py --cover all`` compiles all, in ten minutes an architecture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.kernels.choices.tile_sizes import COMPILED_FOR
from support.kernels.compile_kernels import ARCHITECTURES
from support.kernels.uninterpreted import run_uninterpreted

# Bytes a thread may spill, where that was measured to be faster than what does not spill: on an
# H100 at rank 64, a projector's step took 395 µs so and 474 without, at M, K, N = 16384, 768, 3072.
SPILLS = {("_output_side_kernel", 64): 80}
# On sm_120 three launches of wide blocks or ranks spill a little (triton 3.9.0). Nothing has been
# measured there, so they are left as they are.
SPILLS_OF = {120: 64}


def rank_of(cost: dict[str, Any]) -> int | None:
    """The padded rank in a launch's title."""
    found = re.search(r"\bRANK=(\d+)", cost["title"])
    return None if found is None else int(found[1])


def allowed_from_registers(cost: dict[str, Any]) -> int:
    """How many wgmma may take A from registers: none but of a product that makes L on its way.

    That hands L on to one product behind its loop, in slices of 16, or zeros where nothing becomes
    of L, and awaits it at once; flattened loops hold it twice. test_every_launch.py runs each.
    """
    if cost["kernel"] != "_gemm_kernel" or (
        " without " in cost["title"] and "inner" in cost["title"].split(" without ")[1]
    ):
        return 0
    return 2 * (rank_of(cost) or 0) // 16


def compiled(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """Run ``compile_launches.py`` and return its figures."""
    figures = tmp_path / "figures.json"
    run_uninterpreted(tmp_path, "compile_launches.py", *options, "--json", str(figures))
    return json.loads(figures.read_text())


def test_every_architecture_that_auto_takes_is_compiled_here() -> None:
    (marked,) = (m for m in test_launches_fit_the_device.pytestmark if m.name == "parametrize")
    compiled_here = {int(case.values[0][1]) for case in marked.args[1]}
    assert compiled_here == {10 * major + minor for major, minor in COMPILED_FOR}
    assert set(ARCHITECTURES) == compiled_here


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--arch", "90", "--cover", "pairs", "--quick"), id="sm_90"),
        pytest.param(("--arch", "80", "--cover", "values", "--quick"), id="sm_80"),
        pytest.param(("--arch", "86", "--cover", "values", "--quick"), id="sm_86"),
        pytest.param(("--arch", "89", "--cover", "values", "--quick"), id="sm_89"),
        pytest.param(("--arch", "100", "--cover", "values", "--quick"), id="sm_100"),
        pytest.param(("--arch", "120", "--cover", "values", "--quick"), id="sm_120"),
    ],
)
def test_launches_fit_the_device(options: tuple[str, ...], tmp_path: Path) -> None:
    costs = compiled(tmp_path, *options)
    assert len(costs) >= 15, "the matrix of projectors launches next to nothing"
    wrong = []
    for cost in costs:
        if cost["error"]:
            wrong.append((cost, cost["error"]))
        if cost["shared"] > cost["shared_limit"]:
            wrong.append((cost, f"shared memory {cost['shared']} > {cost['shared_limit']}"))
        allowed = SPILLS.get((cost["kernel"], rank_of(cost)), SPILLS_OF.get(cost["arch"], 0))
        if cost["local"] > allowed:
            wrong.append((cost, f"spills {cost['local']} bytes"))
        if cost["scratch"]:
            wrong.append((cost, f"needs an allocator for {cost['scratch']} bytes"))
        if cost["register_a"] > allowed_from_registers(cost):
            wrong.append((cost, f"{cost['register_a']} wgmma take A from registers"))
    listed = "\n".join(f"{cost['title']} [{cost['origin']}]: {what}" for cost, what in wrong)
    assert not wrong, f"{len(wrong)} of {len(costs)} launches:\n{listed}"
    if "90" in options:
        # Else the pattern that finds them has gone stale with a new compiler.
        assert any(cost["wgmma"] for cost in costs)


def test_a_product_that_breaks_the_rule_is_recognised(tmp_path: Path) -> None:
    """A kernel whose second product takes A from registers, and which spills besides."""
    (cost,) = compiled(tmp_path, "--self-check")
    assert cost["error"] == ""
    assert 0 < cost["register_a"] < cost["wgmma"]
    assert cost["local"] > 0
    assert cost["shared"] > 0
