"""Which tile sizes a product of a given shape is launched with. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of ``_gemm_kernel``. ``programs`` = 0 launches one program per tile."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8
    programs: int = 0
    flatten: bool = False
    subtile: bool = False
    tma: bool = True


@dataclass(frozen=True)
class OutputSideConfig:
    """Tile sizes of ``_output_side_kernel``; ``programs`` sets the number of splits."""

    block_m: int = 32
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 528


@dataclass(frozen=True)
class InputSideConfig:
    """Tile sizes of ``_input_side_kernel``; ``programs`` sets the number of splits."""

    block_m: int = 32
    window: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 660


def choose_gemm(
    m: int, n: int, *, companion: bool, capability: tuple[int, int], processors: int
) -> GemmConfig:
    """Return the tile sizes for an [m, n] product of 16-bit operands.

    Measured on an H100 (benchmarks/results); other devices get sizes that fit them all.

    Args:
        m: Rows of the result.
        n: Columns of the result.
        companion: Whether the LoRA companion rides along, which rules flattening out.
        capability: The device's compute capability.
        processors: Its number of multiprocessors.
    """
    if capability[0] != 9:
        # Within the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
        return GemmConfig(128, 128, 32, num_warps=8, num_stages=3, tma=False)
    flatten = not companion
    if ceil_div(m, 128) * ceil_div(n, 256) >= 2 * processors:
        return GemmConfig(
            128, 256, 64, num_warps=8, num_stages=3, group_m=4 if companion and n <= 768 else 8,
            programs=processors, flatten=flatten, subtile=True,
        )  # fmt: skip
    if companion:
        return GemmConfig(64, 256, 64, num_warps=4, num_stages=4, programs=processors, subtile=True)
    if ceil_div(m, 128) * ceil_div(n, 128) < processors:
        return GemmConfig(
            128, 128, 64, num_warps=4, num_stages=3, programs=2 * processors, flatten=True,
            subtile=True,
        )  # fmt: skip
    return GemmConfig(
        128, 128, 64, num_warps=8, num_stages=4, programs=processors, flatten=True, subtile=True
    )


def choose_output_side(n: int) -> OutputSideConfig:
    """Return the tile sizes for the sums over the tokens of [m, n] gradients."""
    return OutputSideConfig(programs=792 if n > 4096 else 528)


def choose_input_side(r_pad: int) -> InputSideConfig:
    """Return the tile sizes for the walk over the inputs with a LoRA of padded rank r_pad."""
    return InputSideConfig(num_stages=3 if r_pad <= 64 else 2)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded_rank(r: int) -> int:
    """The rank as the kernels take it: a power of two, at least 16."""
    return max(16, 1 << (r - 1).bit_length())


def split_tokens(m: int, columns: int, block_m: int, programs: int) -> tuple[int, int]:
    """Split the sum over m tokens so that ``columns`` times the splits is about ``programs``.

    Fixed by the shape alone, not by the device, so that results repeat across devices.

    Returns:
        (number of splits, tokens in each: a multiple of ``block_m``).
    """
    wanted = max(1, min(ceil_div(programs, columns), ceil_div(m, block_m)))
    rows = ceil_div(ceil_div(m, wanted), block_m) * block_m
    return ceil_div(m, rows), rows
