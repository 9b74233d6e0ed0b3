"""Which tile sizes a product of a given shape is launched with. Imports no Triton.

In this folder m counts tokens, n and k are the columns of a result or an operand, r_pad is the
padded rank, block_size P; capability and processors are the device's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from prodial_kernels.kernels.choices.costs import COSTS
from prodial_kernels.kernels.choices.partition import (
    block_programs,
    block_window,
    ceil_div,
    split_tokens,
)

# Compute capabilities for which every launch is compiled in
# tests/kernels/projector/test_compile_only.py, and
# found to fit; speed is measured on (9, 0).
COMPILED_FOR = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))

# The widest rank of a fused low-rank product. A wider second accumulator does not fit beside the
# main one, and a loop over slices of L in the epilogue computed wrong results (triton 3.6.0, H100).
MAX_FUSED_RANK = 64


class DeviceLimits(NamedTuple):
    """What the choices need to know of a device: compute capability and multiprocessors."""

    capability: tuple[int, int]
    processors: int


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of ``_gemm_kernel``. ``programs`` = 0 launches one program per tile.

    ``pdl`` asks for a launch while the one that makes an operand drains (projector/pdl.py);
    ``max_registers`` of a thread, 0 for as many as the compiler takes.
    """

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
    pdl: bool = False
    max_registers: int = 0


@dataclass(frozen=True)
class OutputSideConfig:
    """Tile sizes of ``_output_side_kernel``.

    ``items`` sets the number of splits; ``programs`` share them.
    """

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3
    items: int = 264
    programs: int = 264
    tma: bool = False


@dataclass(frozen=True)
class ExactScaleConfig:
    """Tile sizes of ``_exact_scale_kernel``; ``window`` is at least the block size.

    ``shares`` programs divide the inputs: few, since nearly always they have nothing to do.
    """

    block_m: int = 32
    block_n: int = 32
    window: int = 128
    num_warps: int = 8
    num_stages: int = 2
    shares: int = 8


@dataclass(frozen=True)
class InputSideConfig:
    """Tile sizes of ``_input_side_kernel``; ``programs`` sets the number of splits."""

    block_m: int = 32
    window: int = 64
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 264


@dataclass(frozen=True)
class LowRankConfig:
    """Tile sizes of ``_low_rank_parts_kernel``.

    A program owns ``rows`` tokens by ``steps`` times ``depth`` columns of X.
    """

    rows: int = 64
    depth: int = 128
    steps: int = 4
    num_warps: int = 4
    num_stages: int = 3


WIDE = GemmConfig(128, 256, 64, num_warps=8, num_stages=3, subtile=True)
TALL = GemmConfig(64, 256, 64, num_warps=4, num_stages=4, subtile=True)
SMALL = GemmConfig(64, 64, 128, num_warps=4, num_stages=4, flatten=True)
HALF = GemmConfig(64, 128, 64, num_warps=4, num_stages=6, flatten=True)
"""Tiles of a Hopper's products. The first costs the least for its size; ``SMALL`` is for results
that have too few of the others, ``HALF`` for what is left of a result beside whole rounds."""


def choose_low_rank(m: int, r_pad: int, *, dropout: bool, even: bool = True) -> tuple[int, int]:
    """Return (tokens of a program, depth of a step) of L = X I, [m, r_pad], in a separate pass.

    ``dropout``: a mask is drawn on the way. ``even``: rows begin at multiples of 16 elements; other
    addresses take registers.
    """
    if r_pad == 64 and not dropout:
        return 32, 128 if even else 64
    # Few tokens are shared out finely, so that every multiprocessor gets some; of a wide rank, many
    # spill. With dropout the left operand comes from registers, which wgmma gets wrong in places
    # (triton 3.6.0); 16 rows take mma instead.
    rows, depth = (64, 128) if m >= 8192 and r_pad <= 64 else (16, 256)
    if dropout:
        rows, depth = 16, 128
    if r_pad > 16:
        # 32 columns take half the depth; a sum as wide as 128 leaves room for little.
        depth = min(depth, 4096 // r_pad) if r_pad <= 64 else 32
    return rows, depth


# Sums as long as this are shared out, where tokens are too few for programs that walk all of them.
_LONG_SUM, _MANY_COLUMNS, _PARTS_TOKENS = 1024, 4096, 4096


def choose_low_rank_parts(
    m: int, depth: int, r_pad: int, *, scales: bool, capability: tuple[int, int]
) -> LowRankConfig | None:
    """Return the tile sizes of L = X I by parts of its sums, for X [m, depth]; None for a walk.

    ``scales``: dY ⊙ s or U is made in the same read. Of few columns several programs a
    multiprocessor then hide the memory's latency better than a loop's stages: 9.3 against 10.9 µs
    at 2048 × 2560, but 25.2 against 21.8 for U of 8,192 (H200). Of many they leave twice the parts,
    8 MiB at 2048 × 16384, for 3 µs. Addresses of rows that begin at no multiples of 16 elements
    take the registers of larger tiles (392 to 1,088 bytes a thread spilled, triton 3.6.0).
    """
    if r_pad > MAX_FUSED_RANK or m > _PARTS_TOKENS or depth < _LONG_SUM:
        return None
    if capability[0] != 9:
        return LowRankConfig(32, 128 if r_pad == 16 else 64, steps=1, num_stages=1)
    if depth % 16:
        return LowRankConfig(64 if r_pad == 64 else 32, 64, steps=8)
    if scales and r_pad == 16 and depth < _MANY_COLUMNS:
        return LowRankConfig(depth=256, steps=1, num_stages=1)
    return LowRankConfig()


# The most programs of the launch before behind which PDL pays for tall tiles, for each
# multiprocessor: programs that scale, that apply blocks, and that share the launch with L.
_BEHIND_SCALE, _BEHIND_BLOCKS, _BEHIND_LOW = 32, 6, 1.5


def pdl_pays(
    config: GemmConfig, before: int, *, block_size: int, beside_low: bool, processors: int
) -> bool:
    """Whether a Hopper's product is better launched with PDL, after ``before`` programs.

    Those make an operand of blocks of ``block_size``, and L too where ``beside_low``. On an H100
    wide tiles gain 0.5 to 2 µs, and so do tall ones after few programs. After more of them tall
    tiles lose 3 to 28%, from their first round to their last, for no reason found.
    """
    most = _BEHIND_LOW if beside_low else _BEHIND_SCALE if block_size == 1 else _BEHIND_BLOCKS
    return config.tma and (config.block_m == WIDE.block_m or before <= most * processors)


def tiles_of(config: GemmConfig, m: int, n: int) -> int:
    """How many tiles an [m, n] result has."""
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)


def pointer_gemm(block_n: int, programs: int = 0) -> GemmConfig:
    """Return the tile sizes of a product whose operands the copy engine does not load."""
    return GemmConfig(128, block_n, 32, num_warps=8, num_stages=3, programs=programs, tma=False)


def choose_output_side(
    m: int,
    n: int,
    r_pad: int,
    *,
    bias: bool,
    capability: tuple[int, int],
    programs: int,
    co_resident: bool = False,
    alone: bool = False,
) -> OutputSideConfig:
    """Return the tile sizes for the sums over the tokens of [m, n] gradients.

    Args:
        m: Tokens.
        n: Columns.
        r_pad: Padded rank of the LoRA term.
        bias: Whether there is one, for which a wide tile leaves no registers.
        capability: The device's compute capability.
        programs: Multiprocessors it may fill, one program each.
        co_resident: Whether each of them runs a program of the product too, which leaves room for
            half the tile.
        alone: Whether nothing else runs meanwhile: then two programs a multiprocessor, of half the
            tile and half the warps, read faster by 4 to 15% (H200).
    """
    if capability[0] != 9:
        if r_pad <= 64:
            return OutputSideConfig(32, 64)
        return OutputSideConfig(16, 64 if r_pad <= 128 else 32, num_stages=2)
    block_m = 64 if r_pad <= 128 else 16
    block_n = 64 if r_pad <= 128 else 32
    pairs = alone and r_pad <= 64 and not bias
    if pairs:
        programs *= 2
    if r_pad <= 64 and not bias and not co_resident and not pairs:
        # At rank 64 this spills a few registers, and is still a fifth faster than half the rows.
        block_n = 128
    columns, tiles = ceil_div(n, block_n), ceil_div(m, block_m)

    def duration(splits: int) -> float:
        # Few parts are cheaper to add up.
        return walked_tiles(columns, tiles, splits, programs) + COSTS.walk_split * splits

    splits = min(range(1, 33), key=duration)
    return OutputSideConfig(
        block_m, block_n, num_warps=4 if co_resident or pairs else 8, num_stages=3,
        items=columns * splits, programs=programs, tma=True,
    )  # fmt: skip


def walked_tiles(columns: int, tiles: int, splits: int, programs: int) -> int:
    """How many tiles a program of the output side walks, or could in the time that it takes.

    ``columns`` columns of ``tiles`` tiles of tokens each, which are split into ``splits`` parts;
    ``programs`` share the columns of all parts.
    """
    return ceil_div(columns * splits, programs) * (COSTS.walk_ends + ceil_div(tiles, splits))


def choose_exact_scale(
    capability: tuple[int, int], *, block_size: int, even: bool, co_resident: bool = False
) -> ExactScaleConfig:
    """Return the tile sizes for the scale's gradient computed anew.

    Args:
        capability: The device's compute capability.
        block_size: P.
        even: Whether all rows are tokens and begin at multiples of 16 elements; other addresses
            take the registers that a wide tile would.
        co_resident: Whether the product still runs, which leaves 42 KiB of shared memory and a
            third of the registers: not enough for blocks above 64.
    """
    if capability[0] != 9:
        return ExactScaleConfig()
    if co_resident:
        return ExactScaleConfig(64, 64, 64 if block_size <= 64 else 128, num_warps=4, num_stages=2)
    return ExactScaleConfig(64, 128 if even else 64, 128, num_warps=8, num_stages=3)


# From so many tiles of a walk over the inputs on, ones of twice the rows read faster: 43.0 against
# 45.5 µs at 16384 × 1536, 30.6 against 32.5 at 8192 × 2048, at rank 64 34.8 against 38.5 (H200).
_LONG_WALK = 16


def choose_input_side(
    m: int,
    k: int,
    r_pad: int,
    block_size: int,
    *,
    dropout: bool,
    channel_first: bool,
    capability: tuple[int, int],
) -> InputSideConfig:
    """Return the tile sizes for the walk over [m, k] inputs.

    ``dropout``: a mask is drawn on the way. ``channel_first``: the inputs are.
    """
    large = block_size > 64 or r_pad > 64 or (dropout and (r_pad > 32 or channel_first))
    if large or (capability[0] != 9 and (block_size > 1 or r_pad > 32)):
        # What a program sums is large; fewer rows and more warps keep it in registers.
        stages = 3 if r_pad <= 64 else 2 if r_pad <= 128 else 1
        return InputSideConfig(16, num_warps=8, num_stages=stages)
    config = InputSideConfig()
    columns = block_programs(k, block_window(config.window, block_size), block_size)
    _, rows = split_tokens(m, columns, config.block_m, config.programs)
    tiles = ceil_div(rows, config.block_m)
    if tiles >= _LONG_WALK and block_size == 1 and not (dropout or channel_first):
        return replace(config, block_m=2 * config.block_m, num_stages=3)
    if tiles < 4:
        # Short walks pay for their beginnings, and for the parts that they leave to add up.
        return replace(config, programs=config.programs // 2, num_stages=3)
    return replace(config, num_stages=3) if tiles <= 8 else config


def padded_rank(r: int) -> int:
    """The rank as the kernels take it: a power of two, at least 16."""
    return max(16, 1 << (r - 1).bit_length())
