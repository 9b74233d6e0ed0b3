"""How backward divides the device between what computes and what reads. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from prodial_kernels.kernels.choices.partition import ceil_div, fold_programs
from prodial_kernels.kernels.choices.tile_sizes import (
    MAX_FUSED_RANK,
    TALL,
    WIDE,
    GemmConfig,
    OutputSideConfig,
    begins_early,
    choose_output_side,
    pointer_gemm,
    tiles_of,
    walked_tiles,
)


@dataclass(frozen=True)
class BackwardPlan:
    """How backward divides the device.

    Attributes:
        gemm: Tile sizes of the product towards the input.
        output_side: Tile sizes of the sums over the tokens of dY.
        companion: T = α dY B rides along with the product; otherwise it is a product of its own.
        side_processors: Multiprocessors that the output side (and T, where it is a product of its
            own) gets beside the product; 0 where both run on all of them.
        among: Where they do, whether at the same time: the output side then begins after the
            product, with what that leaves of each multiprocessor. Else it comes before.
        late: Whether the output side, beside the product, may go on beside the input side too.
    """

    gemm: GemmConfig
    output_side: OutputSideConfig
    companion: bool
    side_processors: int
    among: bool = False
    late: bool = False

    def on(self, processors: int) -> BackwardPlan:
        """Return the plan with as many programs as its share of ``processors`` takes."""
        if not self.side_processors:
            return self
        return replace(
            self,
            gemm=replace(self.gemm, programs=processors - self.side_processors),
            output_side=replace(self.output_side, programs=self.side_processors),
            among=False,
        )


@dataclass(frozen=True)
class _Tile:
    """A tile of the product, and what it takes on one multiprocessor of an H100.

    Attributes:
        riding: Tile sizes with T riding along.
        roomy: With T riding along, and with room left for the output side.
        alone: Tile sizes without T.
        step: µs for 1000 elements of the sum along N.
        companion: What T adds, as a share: a part that is always there, and one for every 16 of
            the rank.
        crowding: What the output side among its programs adds, as a share of what that takes alone.
    """

    riding: GemmConfig
    roomy: GemmConfig
    alone: GemmConfig
    step: float
    companion: tuple[float, float]
    crowding: float


# Without T there is room for one more stage of the widest tile. Flattened, neither leaves room, and
# the widest takes two registers too many, which nothing misses.
_WIDE = _Tile(
    replace(WIDE, flatten=True), replace(WIDE, max_registers=168),
    replace(WIDE, num_stages=4, flatten=True), 10.5, (0.10, 0.03), 0.32,
)  # fmt: skip
_TALL = _Tile(
    replace(TALL, flatten=True), TALL, replace(TALL, flatten=True), 5.8, (0.07, 0.03), 0.15
)
# Where the widest tile takes more rounds, the tall one gains nothing: it reads L2 at its limit.
_TALL_ROUNDS = 4
# The widest rank at which there is room among a product's programs: 42 KiB of shared memory and
# 22,500 registers, of which the output side takes 39 KiB and 21,500.
_AMONG_RANK = 16
# Among tall tiles it is not faster with more rounds of the widest, or more tokens.
_AMONG_ROUNDS, _AMONG_TOKENS = 2, 2048
# How many more rounds than it needs the product may take, as a share, for multiprocessors that the
# output side gets.
_MORE_ROUNDS = 0.5

# µs on an H100: a launch with its first and last tile; fork and join; what a tile's end adds where
# the next one has not begun, as it has not without flattening; one tile of the output side.
_LAUNCH, _FORK, _TILE_END, _WALK_TILE = 3.5, 2.0, 0.5, 0.63
# What the output side takes among the product's programs, of what it takes alone.
_AMONG = 1.3
# What a sum over the tokens takes longer at rank 64 than at 16, as a share.
_WALK_RANK = 0.24
# µs of what comes before the product, besides its memory, and µs that the output side must hold the
# input side up for that to go first: reduce is then not launched early.
_PREPARE, _LATE = 1.0, 1.0
# Bytes per µs there: of the memory; what T's own product reads, on one multiprocessor and at most.
_MEMORY_RATE, _T_RATE, _T_LIMIT = 2.4e6, 60e3, 2.0e6


@lru_cache(maxsize=1024)
def choose_backward(
    m: int,
    n: int,
    k: int,
    r_pad: int,
    *,
    wants_t: bool,
    output_side: bool,
    through_weight: bool,
    bias: bool,
    channel_first: bool,
    capability: tuple[int, int],
    processors: int,
) -> BackwardPlan:
    """Return the plan of backward for dY [m, n] and X [m, k].

    The product is bound by arithmetic, the output side and T by memory, so side by side they can
    cost less than in turn; but a product that runs in rounds of whole tiles loses a round or none.
    Compares the plans by rates measured on an H100.

    Args:
        m: Tokens.
        n: Columns of dY.
        k: Columns of dX.
        r_pad: Padded rank.
        wants_t: Whether T is needed.
        output_side: Whether a sum over the tokens of dY is needed.
        through_weight: Whether the product is needed.
        bias: Whether the layer has one.
        channel_first: Whether dX is, which the product then computes as [k, m]; no companion
            rides along with its rows of features.
        capability: The device's compute capability.
        processors: Its number of multiprocessors.
    """
    rides = wants_t and through_weight and not channel_first and r_pad <= MAX_FUSED_RANK

    def walk(programs: int, among: bool = False) -> OutputSideConfig:
        return choose_output_side(
            m, n, r_pad, bias=bias, capability=capability, programs=programs, among=among
        )

    if capability[0] != 9:
        return BackwardPlan(pointer_gemm(64), walk(processors), rides, 0)

    def side(work: OutputSideConfig, companion: bool) -> float:
        return _side_time(m, n, r_pad, work, output_side, wants_t and not companion)

    rows, columns = (k, m) if channel_first else (m, k)
    wide_rounds = ceil_div(tiles_of(WIDE, rows, columns), processors)
    sizes = (_WIDE, _TALL) if wide_rounds <= _TALL_ROUNDS else (_WIDE,)
    # The launch that scales the weight, and also makes T's factor: its time and its programs.
    prepare, scaling = _PREPARE + 4 * n * k / _MEMORY_RATE, fold_programs(n, k, 1)
    plans: list[tuple[float, BackwardPlan]] = []
    for tile, companion in product(sizes, (True, False) if rides else (False,)):
        config = tile.riding if companion else tile.alone
        early = companion and begins_early(
            config, scaling, block_size=1, beside_low=False, processors=processors
        )
        config = replace(config, programs=processors, early=early)
        tiles = tiles_of(config, rows, columns)
        fewest = ceil_div(tiles, processors)

        def multiply(rounds: int, tile: _Tile = tile, companion: bool = companion) -> float:
            if not through_weight:
                return 0.0
            return _product_time(tile, n, rounds, r_pad if companion else 0)

        work = walk(processors)
        in_turn = multiply(fewest) + side(work, companion)
        plans.append((in_turn, BackwardPlan(config, work, companion, 0)))
        for rounds in range(fewest, fewest + max(3, int(_MORE_ROUNDS * fewest) + 1)):
            left = processors - ceil_div(tiles, rounds)
            if left and through_weight and (output_side or (wants_t and not companion)):
                work = walk(left)
                own, others = multiply(rounds), side(work, companion)
                # T is needed by the input side.
                late = companion and others > prepare + own + _LATE
                plan = BackwardPlan(config, work, companion, left, late=late)
                plans.append((max(own, others) + _FORK, plan))
        fits = r_pad <= _AMONG_RANK and not bias
        few = wide_rounds <= _AMONG_ROUNDS and m <= _AMONG_TOKENS
        if companion and output_side and fits and (tile is _WIDE or few):
            work = walk(processors, among=True)
            own = side(work, companion)
            roomy = replace(tile, riding=tile.roomy)
            time = max(multiply(fewest, roomy), _AMONG * own) + tile.crowding * own + _FORK
            config = replace(tile.roomy, programs=processors)
            plans.append((time, BackwardPlan(config, work, companion, 0, among=True)))
    return min(plans, key=lambda plan: plan[0])[1].on(processors)


def _product_time(tile: _Tile, n: int, rounds: int, riding: int) -> float:
    """µs of a product that sums along n, with T of rank ``riding``, 0 for none."""
    one = tile.step * n / 1e3
    if riding:
        always, by_rank = tile.companion
        one *= 1 + always + by_rank * riding / 16
    flat = (tile.riding if riding else tile.alone).flatten
    return _LAUNCH + rounds * (one if flat else one + _TILE_END)


def _side_time(
    m: int, n: int, r_pad: int, work: OutputSideConfig, output_side: bool, apart: bool
) -> float:
    """µs of the output side, where there is one, and of T as a product of its own."""
    time = 0.0
    if output_side:
        # Two launches: exact_scale follows.
        columns, tiles = ceil_div(n, work.block_n), ceil_div(m, work.block_m)
        tile = _WALK_TILE * work.block_m * work.block_n / (64 * 128)
        tile *= 1 + _WALK_RANK * (r_pad - 16) / 48
        walked = walked_tiles(columns, tiles, work.items // columns, work.programs) * tile
        time += 2 * _LAUNCH + max(walked, 4 * m * n / _MEMORY_RATE)
    if apart:
        # A wide rank leaves it room to read but little at a time.
        slower = (r_pad / 16) ** 1.5
        time += _LAUNCH + slower * 2 * m * n / min(work.programs * _T_RATE, _T_LIMIT)
    return time
