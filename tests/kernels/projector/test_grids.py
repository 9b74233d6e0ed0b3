"""No launch puts what grows with the data on a grid axis that ends, or an offset in 32 bits.

CUDA's first axis ends at 2³¹ − 1 programs, the others at 65,535.
"""

from __future__ import annotations

import importlib
import mmap
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import prodial_kernels.kernels as kernels
from prodial_kernels import prodial_linear
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.cross_entropy import cross_entropy_
from prodial_kernels.kernels.dequantize import dequantize_fp8, dequantize_int8, dequantize_nf4
from prodial_kernels.kernels.dequantize_groups import dequantize_groups
from prodial_kernels.kernels.fp8 import transpose as fp8_transpose
from prodial_kernels.kernels.fp8.library import launch_finish
from prodial_kernels.kernels.fp8.pipelined import PipelinedConfig, launch_pipelined_product
from prodial_kernels.kernels.fp8.product import choose_product, launch_product
from prodial_kernels.kernels.fp8.quantize import launch_quantize
from prodial_kernels.kernels.fp8.rounding_side import choose_rounding_side, launch_rounding_side
from prodial_kernels.kernels.layout import launch_gate, launch_transpose
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import make_case
from support.kernels.launch_matrix import Projector
from support.kernels.launch_recorder import DEVICES, Recorder

FIRST, OTHERS = 2**31 - 1, 2**16 - 1
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
]
LAUNCHERS = [module for module in MODULES if hasattr(module, "launch")]


@dataclass(frozen=True)
class Grid:
    """How many programs a kernel was launched with."""

    kernel: str
    sizes: tuple[int, ...]


@contextmanager
def grids(arch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Grid]]:
    """Collect the grids of what is launched on fake tensors, of which no memory exists."""
    seen: list[Grid] = []

    def launch(kernel: Any, grid: tuple[int, ...], *_: Any, **__: Any) -> None:
        seen.append(Grid(kernel.__name__, grid))

    with monkeypatch.context() as patch, Recorder().on(DEVICES[arch]):
        for module in LAUNCHERS:
            patch.setattr(module, "launch", launch)
        # Which fake tensors cannot be recorded for.
        patch.setattr(recorded_calls, "replayable", lambda tensor: False)
        passes.device_limits.cache_clear()
        yield seen
    passes.device_limits.cache_clear()


def assert_within(seen: list[Grid], expected: set[str]) -> None:
    assert {grid.kernel for grid in seen} == expected
    for grid in seen:
        assert 1 <= grid.sizes[0] <= FIRST, grid
        assert len(grid.sizes) <= 3
        assert all(1 <= size <= OTHERS for size in grid.sizes[1:]), grid


PLAIN = Projector(m=2048, k=768, n=768, block_size=None, r=8)
HUGE = {
    "tokens": {"m": 2**23},
    "tokens and dropout": {"m": 2**23, "dropout": True},
    "inputs": {"k": 2**20, "m": 64},
    "outputs": {"n": 2**20, "m": 64},
    "sequences of x": {"m": 8 * 200_000, "sequences": 200_000, "x_channel_first": True},
    "sequences of y": {"m": 8 * 200_000, "sequences": 200_000, "y_channel_first": True},
    "tokens of a small weight": {"m": 2**23, "k": 192},
    "wide rank": {"r": 4096, "n": 2**18, "m": 64},
    "wide rank and dropout": {"r": 512, "m": 2**18, "dropout": True},
}


@pytest.mark.parametrize("arch", sorted(DEVICES))
@pytest.mark.parametrize("block_size", [None, 1, 48])
@pytest.mark.parametrize("case", HUGE)
def test_projectors(
    case: str, block_size: int | None, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(PLAIN, block_size=block_size, **HUGE[case]).fits()
    with grids(arch, monkeypatch) as seen:
        one.launch()
    assert {"_gemm_kernel", "_reduce_kernel"} <= {grid.kernel for grid in seen}
    assert_within(seen, {grid.kernel for grid in seen})


@pytest.mark.parametrize(
    "shape", [(2**20, 1536, 8), (2**27, 16, 1), (2**25, 1, 63), (2, 2**26, 3), (2, 3, 2**26)]
)
def test_layouts(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with grids(90, monkeypatch) as seen:
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        launch_transpose(x)
        launch_gate(x, x)
    assert_within(seen, {"_transpose_kernel", "_gate_kernel"})


def test_stored_weights_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 2**18, 2**15
    with grids(90, monkeypatch) as seen:

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        half = torch.bfloat16
        dequantize_nf4(
            empty(n * k // 2, 1, dtype=torch.uint8), empty(n * k // 64), empty(16), None, None,
            shape=(n, k), dtype=half, blocksize=64, nested_blocksize=256,
        )  # fmt: skip
        dequantize_int8(empty(n, k, dtype=torch.int8), empty(n), None, dtype=half, step=1.0)
        codes = empty(n, k, dtype=torch.float8_e4m3fn)
        dequantize_fp8(codes, empty(n // 128, k // 128), None, dtype=half)
        dequantize_groups(
            empty(n, k // 2, dtype=torch.uint8), empty(n, k // 64), None, None, None, dtype=half,
            k=k, width=4, columns=64, zero=8,
        )  # fmt: skip
        rows = 2**24
        cross_entropy_(
            empty(rows, 300), empty(rows, dtype=torch.int64), empty(rows), scale=1.0, ignored=-100,
            gradient=True,
        )  # fmt: skip
    stored = {"_nf4_kernel", "_eight_bit_kernel", "_groups_kernel"}
    assert_within(seen, {*stored, "_cross_entropy_kernel"})


@pytest.mark.parametrize(("m", "k", "n"), [(2**26, 4096, 128), (1, 2**24, 256), (128, 256, 2**24)])
def test_products_in_fp8(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with grids(90, monkeypatch) as seen:

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        full = torch.float32
        codes = empty(n, k, dtype=torch.float8_e4m3fn)
        scales = empty(-(-n // 128), -(-k // 128), dtype=full)
        y, low, s, b = (
            empty(m, n), empty(m, 16), empty(n, dtype=full), empty(n, 16, dtype=full)
        )  # fmt: skip
        x, _ = launch_quantize(empty(m, k))
        launch_product(x, codes, scales, y, config=choose_product(DeviceLimits((9, 0), 132)))
        launch_pipelined_product(
            x, codes, scales, y, config=PipelinedConfig(unroll=2, programs=132),
            scale_deviation=s, low=low, outer=b,
        )  # fmt: skip
        launch_finish(y, low, s, b, s, 1.0)
        launch_rounding_side(
            y, y, low, Operands(codes, scale_deviation=s, lora_b=b), ProjectionOptions("triton"),
            config=choose_rounding_side(m, n, DeviceLimits((9, 0), 132)),
        )  # fmt: skip
        fp8_transpose.launch_transpose(codes, scales)
    launched = {"_quantize_kernel", "_product_kernel", "_finish_kernel", "_rounding_side_kernel"}
    assert_within(seen, {*launched, "_pipelined_product_kernel", "_transpose_kernel"})


def test_every_launcher_is_checked_here() -> None:
    """A kernel that comes new has to be launched above."""
    names = {module.__name__.rpartition(".")[2] for module in LAUNCHERS}
    assert names == {
        "recorder", "cross_entropy", "dequantize", "dequantize_groups", "exact_scale", "gemm",
        "input_side", "layout", "low_rank", "outer_product", "output_side", "prepare", "reduce",
        "weight_side", "library", "pipelined", "product", "quantize", "rounding_side", "transpose",
    }  # fmt: skip


def far_rows(rows: Tensor) -> Tensor:
    """The same matrix with rows 2³⁰ + 8 elements apart: memory that is reserved, not taken."""
    stride = 2**30 + 8
    size = ((len(rows) - 1) * stride + rows.shape[1]) * rows.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    apart = torch.frombuffer(memory, dtype=rows.dtype).as_strided(rows.shape, (stride, 1))
    return apart.copy_(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory is the host's")
@pytest.mark.parametrize("which", ["x", "weight", "grad_output"])
@pytest.mark.parametrize("block_size", [1, 6])
def test_offsets_beyond_32_bits(which: str, block_size: int) -> None:
    """Under the interpreter, whose 32-bit integers end where a device's do."""
    case = make_case(5, 48, 6, block_size=block_size).cast(torch.float16, torch.float32)

    def run(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        changed = replace(case, **{which: change(getattr(case, which))})
        return changed.run(
            lambda c: prodial_linear(
                c.x, c.weight, blocks=c.blocks, scale=c.scale, lora_a=c.lora_a, lora_b=c.lora_b,
                bias=c.bias, impl="triton",
            )
        )  # fmt: skip

    expected, found = run(Tensor.clone), run(far_rows)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
