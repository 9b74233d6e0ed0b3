"""Which weights are nothing beside their activations, and how their products run.

Imports no Triton.
"""

from __future__ import annotations

from dataclasses import replace

from prodial_kernels.kernels.choices.tile_sizes import (
    MAX_FUSED_RANK,
    DeviceLimits,
    GemmConfig,
    pointer_gemm,
)

# The most elements of such a weight, and for each of them the least tokens. F = dYᵀ X then costs
# less than the passes over dY, Y, X and dX that it spares. Measured on an H200 at 25216 tokens:
# 192 → 768 and 384 → 192 gain; of 384 → 1536 F alone would take twice what it spares.
MOST_ELEMENTS, LEAST_TOKENS = 2**18, 4096
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
