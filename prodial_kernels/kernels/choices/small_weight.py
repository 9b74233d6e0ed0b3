"""Which weights are nothing beside their activations, and how their products run.

Imports no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import (
    MAX_FUSED_RANK,
    DeviceLimits,
    GemmConfig,
    pointer_gemm,
)

# The most elements of such a weight, and for each of them the least tokens. F = dYᵀ X then costs
# less than the passes over dY, Y, X and dX that it spares. Measured on an H200 at 25216 tokens:
# 192 → 768, 384 → 192 and 768 → 384 gain; of 384 → 1536 F alone would take twice what it spares.
MOST_ELEMENTS, LEAST_TOKENS = 5 * 2**16, 4096
# What divides its sides; other addresses take the registers that the sums over it need.
EVEN = 16
# Blocks that fit a tile of the weight.
_MOST_BLOCK = 64
# Tiles for results of few columns, three programs a multiprocessor, and of more.
_NARROW = GemmConfig(64, 64, 64, num_warps=4, num_stages=4, flatten=True)
_BROAD = GemmConfig(128, 128, 64, num_warps=8, num_stages=4, flatten=True)
_NARROW_COLUMNS = 384


def is_small(m: int, n: int, k: int, *, r: int, block_size: int, dropout: bool) -> bool:
    """Whether a weight [n, k] is small beside m tokens; ``r`` and ``block_size`` 0 for none."""
    held = r <= MAX_FUSED_RANK and block_size <= _MOST_BLOCK and not dropout
    even = n % EVEN == k % EVEN == 0
    # The tokens last: a compiler need not know how many they are beside any other weight.
    return held and even and n * k <= MOST_ELEMENTS and m >= LEAST_TOKENS


def choose_small_gemm(columns: int, limits: DeviceLimits) -> GemmConfig:
    """Return the tile sizes for a product of many tokens and so many columns."""
    if limits.capability[0] != 9:
        return pointer_gemm(64)
    if columns <= _NARROW_COLUMNS:
        return replace(_NARROW, programs=3 * limits.processors)
    return replace(_BROAD, programs=limits.processors)


@dataclass(frozen=True)
class SumsConfig:
    """Tile sizes of ``_tile_sums_kernel``.

    A program owns ``rows`` by ``columns`` of F and walks its tokens by ``depth``; ``programs``
    share the work, about.
    """

    rows: int
    columns: int
    depth: int
    programs: int
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = True


# What that kernel's registers hold beside a tile of F: no block, and a rank that wgmma leaves.
_MOST_SUMMED_RANK = 32


def choose_sums(
    n: int, k: int, *, r_pad: int, block_size: int, tma: bool, limits: DeviceLimits
) -> SumsConfig | None:
    """Return the tile sizes for the gradients of a small weight [n, k] from tiles of F.

    None where they do not hold them, and F is written instead. ``tma``: whether the copy engine can
    load dY and X; other addresses take the registers of a large tile.
    """
    if block_size > 1 or r_pad > _MOST_SUMMED_RANK:
        return None
    if limits.capability[0] != 9 or not tma:
        return SumsConfig(64, 64, 32, 4 * limits.processors, num_warps=8, num_stages=2, tma=False)
    if r_pad > 16:
        return SumsConfig(64, 64, 64, 3 * limits.processors, num_stages=4)
    # The one that has the fewer tiles.
    rows, columns = min(
        ((128, 64), (64, 128)), key=lambda tile: ceil_div(n, tile[0]) * ceil_div(k, tile[1])
    )
    return SumsConfig(rows, columns, 64, 2 * limits.processors, num_stages=4)
