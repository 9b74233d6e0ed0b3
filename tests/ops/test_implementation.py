"""Which implementation ``impl="auto"`` takes on which device, and the check that it makes first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear, resolve_impl
from prodial_kernels.kernels.choices.tile_sizes import COMPILED_FOR
from prodial_kernels.ops import implementation, self_check
from prodial_kernels.ops.implementation import choose_impl

# Found before any test replaces it.
DIFFERENCE = self_check.difference


def on_device(dtype: torch.dtype = torch.bfloat16, index: int = 0) -> Any:
    """What is asked of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, is_cuda=True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU, as its properties say and as its check comes out."""
    gpu = SimpleNamespace(
        capability=(8, 9), name="NVIDIA L40S", differs=None, capturing=False, checks=[]
    )

    def difference(device: torch.device, dtype: torch.dtype) -> str | None:
        gpu.checks.append((device.index, dtype))
        return gpu.differs

    implementation.forget_checks()
    monkeypatch.setattr(implementation, "difference", difference)
    monkeypatch.setattr(implementation, "device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    yield gpu
    implementation.forget_checks()


@pytest.mark.parametrize("capability", COMPILED_FOR, ids=str)
def test_kernels_where_they_are_compiled(
    capability: tuple[int, int], device: SimpleNamespace
) -> None:
    device.capability = capability
    assert resolve_impl("auto", on_device()) == "triton"
    assert str(choose_impl("auto", on_device())) == "triton"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "older than Ampere"), ((8, 7), r"not compiled for .* \(sm_87\)"),
     ((12, 1), r"\(sm_121\)")],
)  # fmt: skip
def test_pytorch_elsewhere(
    capability: tuple[int, int], reason: str, device: SimpleNamespace
) -> None:
    device.capability = capability
    choice = choose_impl("auto", on_device())
    assert choice.impl == "torch"
    assert re.search(reason, choice.obstacle)
    assert not device.checks


def test_what_is_said_without_a_device() -> None:
    assert str(choose_impl("auto", torch.zeros(1))) == "torch: x is on cpu"
    assert str(choose_impl("auto", torch.zeros(1, device="meta"))) == "torch: x is on meta"
    assert str(choose_impl("triton", torch.zeros(1))) == "triton"
    layer = ProdialLinear(nn.Linear(6, 4))
    assert "impl='auto' (torch: the weight is on cpu)" in repr(layer)
    layer.impl = "reference"
    assert "impl='reference'" in repr(layer)
    assert "(reference)" not in repr(layer)


def test_fp32_on_a_device(device: SimpleNamespace) -> None:
    assert resolve_impl("auto", on_device(torch.float32)) == "torch"
    assert "float32" in choose_impl("auto", on_device(torch.float32)).obstacle
    assert not device.checks


def test_one_check_for_each_device_and_dtype(device: SimpleNamespace) -> None:
    asked = [on_device(), on_device(index=1), on_device(torch.float16), on_device()]
    assert [resolve_impl("auto", x) for x in [*asked, *asked]] == ["triton"] * 8
    assert device.checks == [(0, torch.bfloat16), (1, torch.bfloat16), (0, torch.float16)]


def test_to_say_what_will_be_taken_is_no_use(device: SimpleNamespace) -> None:
    assert str(choose_impl("auto", on_device(), check=False)) == "triton"
    assert not device.checks


def test_a_check_that_fails_falls_back_loudly_once(device: SimpleNamespace) -> None:
    device.differs = "dx is 31 rounding units from the definition"
    with pytest.warns(RuntimeWarning, match=r"L40S \(cuda:0\).*dx is 31 rounding units"):
        assert resolve_impl("auto", on_device()) == "torch"
    assert resolve_impl("auto", on_device()) == "torch"
    assert "dx is 31" in str(choose_impl("auto", on_device(), check=False))
    assert len(device.checks) == 1


@pytest.mark.parametrize(("capability", "taken"), [((9, 0), "triton"), ((8, 0), "torch")])
def test_a_capture_is_not_disturbed(
    capability: tuple[int, int], taken: str, device: SimpleNamespace
) -> None:
    device.capability, device.capturing = capability, True
    with pytest.warns(RuntimeWarning, match="graph is being captured; run one step before"):
        assert resolve_impl("auto", on_device()) == taken
    assert not device.checks
    device.capturing = False
    assert resolve_impl("auto", on_device()) == "triton"
    assert len(device.checks) == 1


def test_a_compiler_keeps_the_answer_and_does_not_trace_the_check(
    device: SimpleNamespace,
) -> None:
    def function(x: Tensor) -> Tensor:
        taken = implementation._impl_while_compiling(x.device, x.dtype)
        return 2 * x if taken == "triton" else x

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert len(device.checks) == 1


# --- The check itself, on the kernels under the interpreter. --------------------------------------


def test_the_check_passes_what_is_right(kernel_device: str) -> None:
    state = torch.get_rng_state()
    place = torch.device(kernel_device, 0) if kernel_device == "cuda" else torch.device("cpu")
    with torch.inference_mode():
        assert DIFFERENCE(place, torch.float16) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", range(6))
def test_the_check_sees_one_wrong_tile(which: int, kernel_device: str) -> None:
    def wrong(*operands: Tensor) -> list[Tensor]:
        results = self_check.by_definition(*(operand.double() for operand in operands))
        flat = results[which].view(-1)
        flat[-max(1, len(flat) // 64) :] += 0.2 * flat.abs().max()
        return results

    name = ("y", "dx", "dblocks", "dscale", "da", "db")[which]
    found = DIFFERENCE(torch.device(kernel_device), torch.float16, wrong)
    assert found is not None
    assert found.startswith(f"{name} is ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_check_sees_what_is_not_finite(value: float, kernel_device: str) -> None:
    def wrong(*operands: Tensor) -> list[Tensor]:
        results = self_check.by_definition(*(operand.double() for operand in operands))
        results[3][5] = value
        return results

    found = DIFFERENCE(torch.device(kernel_device), torch.float16, wrong)
    assert found is not None
    assert found.startswith("dscale is ")


def test_the_check_survives_a_compiler_that_fails(kernel_device: str) -> None:
    def fail(*operands: Tensor) -> list[Tensor]:
        raise OSError("no assembler\nfor this device")

    found = DIFFERENCE(torch.device(kernel_device), torch.float16, fail)
    assert found == "OSError: no assembler"
