"""Compiles the dequantising kernels without a GPU; fails where they would be slow or too large."""

from __future__ import annotations

import itertools
import sys

import torch
import triton
from compile_launches import broken_rules, cost_of
from launch_recorder import DEVICES, Launch, Recorder
from torch import Tensor
from triton.backends.compiler import GPUTarget

from prodial_kernels.kernels.dequantize import dequantize_fp8, dequantize_int8, dequantize_nf4

ARCHITECTURES = (80, 90, 100)
SHAPES = ((8192, 2048), (333, 257))


def record(recorder: Recorder, dtype: torch.dtype, n: int, k: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    out = empty(n, k, dtype=dtype)
    blocks = -(-n * k // 64)
    codes = empty(-(-n * k // 2), 1, dtype=torch.uint8)
    nested = (empty(-(-blocks // 256)), empty(256), empty())
    for absmax, given in ((empty(blocks, dtype=torch.uint8), nested), (empty(blocks), None)):
        dequantize_nf4(
            codes, absmax, empty(16), given, out, shape=(n, k), dtype=dtype, blocksize=64,
            nested_blocksize=256,
        )  # fmt: skip
    dequantize_int8(empty(n, k, dtype=torch.int8), empty(n), None, dtype=dtype, step=1 / 127)
    tiles = [-(-size // 128) for size in (n, k)]
    dequantize_fp8(empty(n, k, dtype=torch.float8_e4m3fn), empty(*tiles), None, dtype=dtype)


def problems(launch: Launch) -> list[str]:
    """What breaks a rule; where rows are aligned, also whatever is not a wide access."""
    found = broken_rules(cost_of(launch))
    aligned = launch.origin[1] == SHAPES[0]
    if found or not aligned:
        return found
    target = GPUTarget("cuda", launch.device.arch, 32)
    ptx = triton.compile(launch.source, target=target, options=launch.options).asm["ptx"]
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    if not stores or any(".v4.b32" not in line for line in stores):
        found.append(f"stores less than 16 bytes at once: {stores[:2]}")
    if "fma.rn.f32" in ptx:
        found.append("a product and a sum with one rounding")
    return found


def main() -> int:
    """Print every problem; 1 where there is one."""
    launches = []
    for arch, dtype, shape in itertools.product(
        ARCHITECTURES, (torch.bfloat16, torch.float16), SHAPES
    ):
        if arch != 90 and dtype is torch.float16:
            continue
        recorder = Recorder()
        recorder.origin = (dtype, shape)
        with recorder.on(DEVICES[arch]):
            record(recorder, dtype, *shape)
        launches += recorder.launches
    expected = 4 * (len(ARCHITECTURES) + 1) * len(SHAPES)
    if len(launches) != expected:
        print(f"{len(launches)} launches were recorded, expected {expected}")
        return 1
    failed = 0
    for launch in launches:
        for problem in problems(launch):
            failed = 1
            print(f"{launch.title}: {problem}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
