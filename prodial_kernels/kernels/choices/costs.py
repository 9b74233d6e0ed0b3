"""What the plans are compared by: times and rates of the kernels' parts. Imports no Triton.

Measured on an H100 80GB HBM3 (132 multiprocessors) on 2026-11-22 with torch 2.11.0, Triton 3.6.0,
bf16 operands, P = 1. ``python -m benchmarks.projector.fit_costs`` measures the same on the device
at hand and prints it beside these.
"""

from __future__ import annotations

from typing import NamedTuple


class Costs(NamedTuple):
    """Times in µs, rates in bytes per µs, shares without unit.

    Attributes:
        wide_step: 1,000 elements of the sum of a 128×256 tile, on one multiprocessor.
        tall_step: The same of a 64×256 tile.
        small_step: The same of a 64×64 tile, by which no plans of larger ones are compared; of an
            H200, as its low-rank products are.
        tall_round: A round of tall tiles in forward, as a share of one of wide tiles.
        wide_low_rank: What a fused low-rank product adds to a step of a wide tile, as a share: for
            any rank, and for every 16 of the rank.
        tall_low_rank: The same for a tall tile.
        small_low_rank: The same for a 64×64 tile.
        wide_co_resident: What the output side adds to a product of wide tiles that it is
            co-resident with, as a share of what it takes alone.
        tall_co_resident: The same for tall tiles.
        co_resident: What the output side takes there, of what it takes alone.
        tile_end: What a tile's end adds where the next one has not begun, as it has not without
            flattening.
        launch: A launch with its first and last tile.
        fork: Fork and join of a second stream.
        walk_tile: A tile of 64×128 of the output side, on one multiprocessor, at rank 16.
        walk_rank: What that takes longer at rank 64, as a share.
        walk_ends: Beginning and ending a sum over tokens, in tiles of that walk.
        walk_split: What one more split costs where its parts are added up, in the same tiles.
        prepare: What comes before the product, besides its reads and writes.
        deferred: What the output side must hold the input side up for a deferred join to pay:
            reduce is then launched without PDL.
        memory: Reads and writes of the device's memory by one kernel: between an H100's 2.4e6 and
            an H200's 4.05e6, where a rank of 64 takes the plans that are faster on an H200.
        low_rank_one: What a separate low-rank pass reads, by one multiprocessor.
        low_rank_all: The same, by the device.
    """

    wide_step: float = 10.5
    tall_step: float = 5.8
    small_step: float = 2.0
    tall_round: float = 0.55
    wide_low_rank: tuple[float, float] = (0.10, 0.03)
    tall_low_rank: tuple[float, float] = (0.07, 0.03)
    small_low_rank: tuple[float, float] = (0.0, 0.3)
    wide_co_resident: float = 0.32
    tall_co_resident: float = 0.15
    co_resident: float = 1.3
    tile_end: float = 0.5
    launch: float = 3.5
    fork: float = 2.0
    walk_tile: float = 0.63
    walk_rank: float = 0.24
    walk_ends: int = 5
    walk_split: float = 0.05
    prepare: float = 1.0
    deferred: float = 1.0
    memory: float = 3.2e6
    low_rank_one: float = 60e3
    low_rank_all: float = 2.0e6


COSTS = Costs()
# The same as the steps in ``Costs``, of a 64×128 tile, which takes only what is left beside larger
# ones (6 times 384 × 2560 results, summed along 10240, take 235 µs on an H200).
HALF_STEP = 4.3
