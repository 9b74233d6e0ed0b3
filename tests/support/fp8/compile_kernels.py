"""Compiles the kernels of products in fp8 without a GPU; fails where they do not fit or spill."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas

from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.fp8.exact_scale import launch_exact_scale
from prodial_kernels.kernels.fp8.library import launch_finish, pipelined_unroll
from prodial_kernels.kernels.fp8.pipelined import choose_pipelined, launch_pipelined_product
from prodial_kernels.kernels.fp8.product import choose_product, launch_product
from prodial_kernels.kernels.fp8.quantize import Rounded, launch_quantize
from prodial_kernels.kernels.fp8.rounding_side import choose_rounding_side, launch_rounding_side
from prodial_kernels.kernels.fp8.transpose import launch_transpose
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from support.kernels.compile_launches import broken_rules, compile_launch, cost_of, covering
from support.kernels.launch_recorder import DEVICES, Launch, Recorder

CODES = torch.float8_e4m3fn


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def record(m: int, k: int, n: int, r: int, limits: DeviceLimits, dtype: torch.dtype) -> None:
    """Every launch of one projection, with every part that there is."""
    x, dy, low = (empty(*shape, dtype=dtype) for shape in ((m, k), (m, n), (m, r)))
    a, b, s, blocks = empty(r, k), empty(n, r), empty(n), empty(k, 1, 1)
    tiles_n, tiles_k = -(-n // 128), -(-k // 128)
    codes, scales = empty(n, k, dtype=CODES), empty(tiles_n, tiles_k)
    operand = Rounded(empty(m, k, dtype=CODES), empty(tiles_k, -(-m // 4) * 4))
    if r <= 32:
        launch_quantize(x, factor=blocks, relu=True, inner=a, r_pad=r)
        launch_quantize(dy, factor=s, inner=b, transposed=False, r_pad=r)
    launch_quantize(dy, factor=s)
    config = choose_product(limits)
    added: Any = {"scale_deviation": s, "low": low, "outer": b, "bias": s}
    for parts in ({}, added):
        launch_product(operand, codes, scales, dy, config=config, **parts)
    if limits.capability == (9, 0):
        # After a library's product, which Hopper alone has.
        launch_finish(dy, low, s, b, s, 0.5)
        # Once, as that takes seconds: of the widest rank, which leaves the fewest registers.
        if pipelined_unroll(k) and r == 32:
            pipelined = choose_pipelined(k, limits)
            del added["bias"]
            launch_pipelined_product(operand, codes, scales, dy, config=pipelined, **added)
    if n % 128 == 0 and r <= 32:
        operands, options = Operands(codes, blocks, s, a, b), ProjectionOptions("triton", 0.5)
        tile = choose_rounding_side(m, n, limits)
        launch_rounding_side(dy, dy, low, operands, options, config=tile)
    launch_transpose(codes, scales)
    launch_exact_scale(dy, x, codes, scales, empty(8, n), factor=blocks, relu=True)


def serialized(launch: Launch) -> list[str]:
    """Where the assembler lets a pipelined product wait for the one before, which is all its gain.

    It says so (C7510 to C7514) and goes on.
    """
    if launch.kernel != "_pipelined_product_kernel":
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(compile_launch(launch).asm["ptx"])
        source.flush()
        said = subprocess.run(
            [get_ptxas(launch.device.arch).path, "-v", f"--gpu-name=sm_{launch.device.arch}a",
             source.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return [line for line in said.splitlines() if "serialized" in line]


def main() -> int:
    """Print what is broken; 1 where something is."""
    failed = 0
    for arch in (89, 90, 100, 120):
        device = DEVICES[arch]
        recorder = Recorder()
        with recorder.on(device):
            limits = DeviceLimits((arch // 10, arch % 10), device.processors)
            record(8192, 2048, 8192, 16, limits, torch.bfloat16)
            if arch == 90:
                record(512, 2048, 8192, 64, limits, torch.bfloat16)
                record(77, 200, 75, 16, limits, torch.float16)
                record(2048, 1024, 3072, 32, limits, torch.float16)
        # Every two values of constants that a kernel is given together.
        for launch in covering(recorder.launches, "pairs"):
            for problem in (*broken_rules(cost_of(launch)), *serialized(launch)):
                failed = 1
                print(f"{launch.title}: {problem}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
