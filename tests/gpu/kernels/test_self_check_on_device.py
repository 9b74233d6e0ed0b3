"""``impl="auto"`` on a device: its check of the kernels, what it costs, and its fallback."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prodial_kernels import prodial_linear, resolve_impl
from prodial_kernels.kernels.choices.tile_sizes import COMPILED_FOR
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.ops import implementation, self_check
from prodial_kernels.ops.implementation import choose_impl
from prodial_kernels.testing import make_case

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    if torch.cuda.get_device_capability() not in COMPILED_FOR:
        pytest.skip("auto takes PyTorch on this architecture")
    implementation.forget_checks()
    # A recorded product launches what it was recorded from, whatever a test puts in its place.
    recorded_calls.reset()
    yield
    recorded_calls.reset()
    implementation.forget_checks()


def x_of(dtype: torch.dtype) -> Tensor:
    return torch.empty(1, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_this_device_passes(dtype: torch.dtype) -> None:
    state = torch.cuda.get_rng_state()
    assert self_check.difference(torch.device("cuda", 0), dtype) is None
    assert resolve_impl("auto", x_of(dtype)) == "triton"
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.alone
def test_it_takes_little_once_it_is_compiled() -> None:
    place = torch.device("cuda", 0)
    assert self_check.difference(place, torch.bfloat16) is None
    start = time.perf_counter()
    assert self_check.difference(place, torch.bfloat16) is None
    assert time.perf_counter() - start < 0.1


def test_a_wrong_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = passes.launch_gemm

    def wrong(*arguments: object, **options: object) -> object:
        low = launch(*arguments, **options)
        y = arguments[2]
        y[-40:, -30:] += 1.0  # what one tile of the result may come to
        return low

    monkeypatch.setattr(passes, "launch_gemm", wrong)
    case = make_case(300, 64, 48, r=4, device="cuda").cast(torch.bfloat16, torch.float32)
    with pytest.warns(RuntimeWarning, match=r"self-check failed: y is .* rounding units"):
        y = prodial_linear(case.x, case.weight, blocks=case.blocks, scale=case.scale)
    expected = prodial_linear(
        case.x, case.weight, blocks=case.blocks, scale=case.scale, impl="torch"
    )
    assert torch.equal(y, expected)
    assert choose_impl("auto", case.x).impl == "torch"


def test_a_kernel_that_does_not_launch_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    monkeypatch.setattr(passes, "launch_gemm", fail)
    with pytest.warns(RuntimeWarning, match="invalid argument"):
        assert resolve_impl("auto", x_of(torch.float16)) == "torch"


def test_nothing_is_checked_in_a_capture() -> None:
    case = make_case(64, 64, 48, r=4, device="cuda").cast(torch.bfloat16, torch.float32)
    prodial_linear(case.x, case.weight, scale=case.scale, impl="triton")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()

    def captured() -> str:
        with torch.cuda.graph(graph):
            case.x.neg()  # torch warns of a graph in which nothing is launched
            return resolve_impl("auto", case.x)

    with pytest.warns(RuntimeWarning, match="graph is being captured"):
        taken = captured()
    assert taken == ("triton" if torch.cuda.get_device_capability() == (9, 0) else "torch")
    assert implementation._checked == {}


def test_compiled_code_keeps_the_answer() -> None:
    case = make_case(64, 64, 48, r=4, device="cuda").cast(torch.bfloat16, torch.float32)

    @torch.compile(fullgraph=True)
    def function(x: Tensor) -> Tensor:
        return prodial_linear(x, case.weight, scale=case.scale)

    expected = prodial_linear(case.x, case.weight, scale=case.scale, impl="triton")
    assert torch.equal(function(case.x), expected)
    assert [choice.impl for choice in implementation._checked.values()] == ["triton"]
