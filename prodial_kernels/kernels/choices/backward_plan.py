"""How backward divides the device between what computes and what reads. Imports no Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

from prodial_kernels.kernels.choices.costs import COSTS, HALF_STEP
from prodial_kernels.kernels.choices.panels import (
    PANEL_BYTES,
    PANEL_TOKENS,
    WORTH,
    column_panels,
    finer_end,
    low_rank_first,
    rounds_of,
    two_panels,
)
from prodial_kernels.kernels.choices.partition import ceil_div, fold_programs
from prodial_kernels.kernels.choices.tile_sizes import (
    HALF,
    MAX_FUSED_RANK,
    SMALL,
    TALL,
    WIDE,
    DeviceLimits,
    GemmConfig,
    LowRankConfig,
    OutputSideConfig,
    choose_low_rank_parts,
    choose_output_side,
    pdl_pays,
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
        fused_low_rank: T = α dY B is computed within the product, else by a separate pass.
        side_processors: Multiprocessors that the output side (and a separate pass for T) gets
            beside the product; 0 where both run on all of them.
        co_resident: Where they do, whether at the same time: the output side is then launched after
            the product, and uses what that leaves of each multiprocessor. Else it comes before.
        deferred: Whether the output side, beside the product, is joined only after the input side.
        panels: The column panels that s ⊙ W is made in: (first column, how many) of each. T, where
            it is fused, is made by the first panel's product.
        token_parts: Where there are any, dY ⊙ s is made instead, of so many tokens at a time:
            (first token, how many) of each.
        rest: Tile sizes of the last of these parts, or panels, where they are others.
        low_rank: Where T is separate, the tile sizes of its sums by parts; None for a walk over dY.
    """

    gemm: GemmConfig
    output_side: OutputSideConfig
    fused_low_rank: bool
    side_processors: int
    co_resident: bool = False
    deferred: bool = False
    panels: tuple[tuple[int, int], ...] = ()
    token_parts: tuple[tuple[int, int], ...] = ()
    rest: GemmConfig | None = None
    low_rank: LowRankConfig | None = None

    def on(self, processors: int) -> BackwardPlan:
        """Return the plan with as many programs as its share of ``processors`` takes."""
        if not self.side_processors:
            return self
        return replace(
            self,
            gemm=replace(self.gemm, programs=processors - self.side_processors),
            output_side=replace(self.output_side, programs=self.side_processors),
            co_resident=False,
        )


@dataclass(frozen=True)
class ProductTile:
    """A tile of the product, and what it takes on one multiprocessor of an H100.

    Attributes:
        fused: Tile sizes with T fused.
        fused_with_room: With T fused, and with room left for the output side; None where it is
            never co-resident.
        plain: Tile sizes without T.
        step: See ``Costs``, as the next two.
        low_rank: See ``Costs``.
        co_resident: See ``Costs``.
    """

    fused: GemmConfig
    fused_with_room: GemmConfig | None
    plain: GemmConfig
    step: float
    low_rank: tuple[float, float]
    co_resident: float


# Without T there is room for one more stage of the widest tile. Flattened, neither leaves room, and
# the widest takes two registers too many, which nothing misses.
_WIDE = ProductTile(
    replace(WIDE, flatten=True), replace(WIDE, max_registers=168),
    replace(WIDE, num_stages=4, flatten=True),
    COSTS.wide_step, COSTS.wide_low_rank, COSTS.wide_co_resident,
)  # fmt: skip
_TALL = ProductTile(
    replace(TALL, flatten=True), TALL, replace(TALL, flatten=True),
    COSTS.tall_step, COSTS.tall_low_rank, COSTS.tall_co_resident,
)  # fmt: skip
_SMALL = ProductTile(SMALL, None, SMALL, COSTS.small_step, COSTS.small_low_rank, 0.0)
PRODUCT_TILES = {"wide": _WIDE, "tall": _TALL, "small": _SMALL}
# Where the widest tile takes more rounds, the tall one gains nothing: it reads L2 at its limit.
_TALL_ROUNDS = 4
# The widest rank at which the output side can be co-resident: the product leaves 42 KiB of shared
# memory and 22,500 registers, of which the output side takes 39 KiB and 21,500.
_CO_RESIDENT_RANK = 16
# With tall tiles that is not faster with more rounds of the widest, or more tokens.
_CO_RESIDENT_ROUNDS, _CO_RESIDENT_TOKENS = 2, 2048
# How many more rounds than it needs the product may take, as a share, for multiprocessors that the
# output side gets.
_MORE_ROUNDS = 0.5
# dY ⊙ s is made in the place of s ⊙ W for at most so many tokens, in parts whose tiles fill their
# rounds to this share: that took as long, at the shapes in LOG.md (2026-11-30). Beside them, where
# it fits, runs the output side, which fills what is left.
_TOKEN_SIDE, _WIDE_FILL, _TALL_FILL = 4096, 0.9, 0.95
_WIDE_GAIN = 0.9
# s ⊙ W of more than this share of what the layer returns is made in two panels, where the product
# has the multiprocessors for it; at most so many fewer are then left for the output side.
_HEAVY, _FEWER_BESIDE = 0.1, 3
# All tokens at once, where that moves but so small a share of the bytes, whatever the tiles fill.
_LIGHT = 0.25


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
    limits: DeviceLimits,
    scales: Literal["nothing", "weight", "either"] = "nothing",
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
        channel_first: Whether dX is, which the product then computes as [k, m]; T, of tokens by
            rows, is then not fused.
        limits: Of the device.
        scales: What is scaled for the product: s ⊙ W (``"weight"``), that or dY ⊙ s, whose rows are
            tokens then (``"either"``), or nothing.
    """
    capability, processors = limits
    fusable = wants_t and through_weight and not channel_first and r_pad <= MAX_FUSED_RANK

    def settled(plan: BackwardPlan) -> BackwardPlan:
        if wants_t and not plan.fused_low_rank:
            # In few spans, whose parts lie beside a part of dY ⊙ s: 1.6 µs more at 2048 × 2560.
            by_parts = choose_low_rank_parts(m, n, r_pad, scales=False, capability=capability)
            plan = replace(plan, low_rank=by_parts)
        if plan.side_processors or plan.co_resident:
            return plan
        alone = choose_output_side(
            m, n, r_pad, bias=bias, capability=capability, programs=processors, alone=True
        )
        return replace(plan, output_side=alone)

    def walk(programs: int, co_resident: bool = False) -> OutputSideConfig:
        return choose_output_side(
            m, n, r_pad, bias=bias, capability=capability, programs=programs,
            co_resident=co_resident,
        )  # fmt: skip

    if capability[0] != 9:
        return BackwardPlan(pointer_gemm(64), walk(processors), fusable, 0, panels=((0, k),))

    def side(work: OutputSideConfig, fused: bool) -> float:
        return _side_time(m, n, r_pad, work, output_side, wants_t and not fused)

    rows, columns = (k, m) if channel_first else (m, k)
    wide_rounds = ceil_div(tiles_of(WIDE, rows, columns), processors)
    sizes = [_WIDE, _TALL] if wide_rounds <= _TALL_ROUNDS else [_WIDE]
    if not channel_first and tiles_of(SMALL, m, k) <= processors:
        sizes.append(_SMALL)
    # The launch that scales the weight, and also makes T's factor: its time and its programs.
    prepare, scaling = COSTS.prepare + 4 * n * k / COSTS.memory, fold_programs(n, k, 1)
    plans: list[tuple[float, BackwardPlan]] = []
    resident: BackwardPlan | None = None
    for tile, fused in product(sizes, (True, False) if fusable else (False,)):
        config = tile.fused if fused else tile.plain
        pdl = fused and pdl_pays(
            config, scaling, block_size=1, beside_low=False, processors=processors
        )
        config = replace(config, programs=processors, pdl=pdl)
        tiles = tiles_of(config, rows, columns)
        fewest = ceil_div(tiles, processors)

        def multiply(rounds: int, tile: ProductTile = tile, fused: bool = fused) -> float:
            if not through_weight:
                return 0.0
            return _product_time(tile, n, rounds, r_pad if fused else 0)

        work = walk(processors)
        in_turn = multiply(fewest) + side(work, fused)
        plans.append((in_turn, BackwardPlan(config, work, fused, 0)))
        for rounds in range(fewest, fewest + max(3, int(_MORE_ROUNDS * fewest) + 1)):
            left = processors - ceil_div(tiles, rounds)
            if left and through_weight and (output_side or (wants_t and not fused)):
                work = walk(left)
                own, others = multiply(rounds), side(work, fused)
                # T is needed by the input side.
                deferred = fused and others > prepare + own + COSTS.deferred
                plan = BackwardPlan(config, work, fused, left, deferred=deferred)
                plans.append((max(own, others) + COSTS.fork, plan))
        fits = r_pad <= _CO_RESIDENT_RANK and not bias and tile.fused_with_room is not None
        few = wide_rounds <= _CO_RESIDENT_ROUNDS and m <= _CO_RESIDENT_TOKENS
        if fused and output_side and fits and (tile is _WIDE or few):
            room = tile.fused_with_room or tile.fused
            work = walk(processors, co_resident=True)
            own = side(work, fused)
            product_time = multiply(fewest, replace(tile, fused=room))
            time = max(product_time, COSTS.co_resident * own) + tile.co_resident * own + COSTS.fork
            config = replace(room, programs=processors)
            plan = BackwardPlan(config, work, fused, 0, co_resident=True)
            plans.append((time, plan))
            resident = plan if tile is _WIDE else resident
    time, plan = min(plans, key=lambda plan: plan[0])
    plan = plan.on(processors)
    if scales == "nothing":
        return settled(replace(plan, panels=((0, k),)))
    plan = replace(plan, panels=column_panels(m, k, 2 * n, plan.gemm))
    if through_weight and not channel_first:
        plan = _in_panels(m, n, k, r_pad, plan, resident, walk, processors)
    if scales == "weight" or channel_first or not through_weight or m > min(k, _TOKEN_SIDE):
        return settled(plan)
    fits = output_side and r_pad <= _CO_RESIDENT_RANK and not bias
    parts = _token_parts(m, k, fits, fits or not output_side, processors)
    if parts is None or 2 * parts.tokens > max(width for _, width in plan.panels):
        return settled(plan)
    config = replace(parts.gemm, programs=processors)
    pdl = pdl_pays(
        config, fold_programs(parts.tokens, n, 1), block_size=1, beside_low=False,
        processors=processors,
    )  # fmt: skip
    plan = BackwardPlan(
        replace(config, pdl=pdl), walk(processors, co_resident=parts.co_resident), False, 0,
        co_resident=parts.co_resident, panels=((0, k),),
        token_parts=tuple((at, min(parts.tokens, m - at)) for at in range(0, m, parts.tokens)),
        rest=_rest(m % parts.tokens, k, parts, processors),
    )  # fmt: skip
    return settled(plan)


def _in_panels(
    m: int,
    n: int,
    k: int,
    r_pad: int,
    plan: BackwardPlan,
    resident: BackwardPlan | None,
    walk: Callable[[int], OutputSideConfig],
    processors: int,
) -> BackwardPlan:
    """Return the plan with s ⊙ W in such panels as bound it, where they cost little or nothing.

    Args:
        m: Tokens.
        n: Columns of dY.
        k: Columns of dX.
        r_pad: Padded rank.
        plan: The fastest by the costs of the product, which know no panels.
        resident: The plan of wide tiles that the output side is co-resident with, if there is one.
        walk: Tile sizes of the output side on so many multiprocessors.
        processors: Of the device.
    """
    size = 2 * n * k
    if len(plan.panels) == 1 and resident is not None and m >= PANEL_TOKENS and size > PANEL_BYTES:
        # All multiprocessors multiply then, whose rounds panels can fill.
        panels = column_panels(m, k, 2 * n, resident.gemm)
        plan = plan if len(panels) == 1 else replace(resident, panels=panels)
    if len(plan.panels) == 1:
        heavy = m >= PANEL_TOKENS and size > _HEAVY * 2 * m * (n + k)
        halves = two_panels(m, k, plan.gemm) if heavy and plan.side_processors else None
        if halves is not None:
            panels, programs = halves
            if 0 <= programs - plan.gemm.programs <= _FEWER_BESIDE:
                left = processors - programs
                plan = replace(
                    plan, gemm=replace(plan.gemm, programs=programs), output_side=walk(left),
                    side_processors=left, panels=panels,
                )  # fmt: skip
        return plan
    if plan.gemm.block_m != WIDE.block_m:
        return plan
    step = COSTS.wide_step * n / 1e3
    always, by_rank = COSTS.wide_low_rank
    panels = low_rank_first(plan.panels, m, plan.gemm)
    spared = rounds_of(plan.gemm, m, plan.panels[0][1]) - rounds_of(plan.gemm, m, panels[0][1])
    low_rank = step * (always + by_rank * r_pad / 16)
    if plan.fused_low_rank and spared * low_rank - COSTS.launch > WORTH:
        plan = replace(plan, panels=panels)
    if step - HALF_STEP * n / 1e3 - COSTS.launch > WORTH:
        panels, rest = finer_end(plan.panels, m, plan.gemm)
        plan = replace(plan, panels=panels, rest=rest)
    return plan


class _TokenParts(NamedTuple):
    """dY in parts of so many tokens, and how their products run."""

    tokens: int
    gemm: GemmConfig
    step: float
    co_resident: bool


def _token_parts(m: int, k: int, fits: bool, fills: bool, processors: int) -> _TokenParts | None:
    """Return the smallest parts of m tokens that cost a product towards k columns no round.

    Args:
        m: Tokens.
        k: Columns of dX.
        fits: Whether the output side may be co-resident.
        fills: Whether several parts were measured: with the output side so, or without any.
        processors: Of the device.
    """
    tiles = [(_WIDE, _WIDE_FILL), (_TALL, _TALL_FILL)]
    if tiles_of(SMALL, m, k) <= processors:
        tiles.append((_SMALL, 1.0))

    def rounds(config: GemmConfig, tokens: int) -> int:
        return ceil_div(tiles_of(config, tokens, k), processors)

    def time(tile: ProductTile) -> float:
        return rounds(tile.plain, m) * tile.step * (_WIDE_GAIN if tile is _WIDE else 1)

    tile, share = min(tiles, key=lambda pair: time(pair[0]))
    co_resident = fits and (tile is _WIDE or (tile is _TALL and m > _LIGHT * k))
    config = tile.fused_with_room if co_resident and tile.fused_with_room else tile.plain
    across, area = ceil_div(k, config.block_n), config.block_m * config.block_n
    # Alone a part pays where the output side is beside it, or where it is light.
    alone = m <= _LIGHT * k or (fills and tile is _WIDE)
    for taken in range(1, rounds(config, m) + 1):
        tokens = min(taken * processors // across * config.block_m, m)
        if not tokens:
            continue
        whole, rest = divmod(m, tokens)
        filled = tokens * k >= share * taken * processors * area
        same = whole * taken + (rounds(config, rest) if rest else 0) <= rounds(config, m)
        if (tokens < m and fills and filled and same) or (tokens == m and alone):
            return _TokenParts(tokens, config, tile.step, co_resident)
    return None


def _rest(tokens: int, k: int, parts: _TokenParts, processors: int) -> GemmConfig | None:
    """Tile sizes for so many tokens that no whole part holds, None for those of the others."""

    def time(config: GemmConfig, step: float) -> float:
        return ceil_div(tiles_of(config, tokens, k), processors) * step

    if not tokens or time(HALF, HALF_STEP) >= time(parts.gemm, parts.step):
        return None
    return replace(HALF, programs=processors)


def _product_time(tile: ProductTile, n: int, rounds: int, rank: int) -> float:
    """µs of a product that sums along n, with T of this padded rank fused, 0 for none."""
    one = tile.step * n / 1e3
    if rank:
        always, by_rank = tile.low_rank
        one *= 1 + always + by_rank * rank / 16
    flat = (tile.fused if rank else tile.plain).flatten
    return COSTS.launch + rounds * (one if flat else one + COSTS.tile_end)


def _side_time(
    m: int, n: int, r_pad: int, work: OutputSideConfig, output_side: bool, separate_t: bool
) -> float:
    """µs of the output side, where there is one, and of a separate pass for T."""
    time = 0.0
    if output_side:
        # Two launches: exact_scale follows.
        columns, tiles = ceil_div(n, work.block_n), ceil_div(m, work.block_m)
        tile = COSTS.walk_tile * work.block_m * work.block_n / (64 * 128)
        tile *= 1 + COSTS.walk_rank * (r_pad - 16) / 48
        walked = walked_tiles(columns, tiles, work.items // columns, work.programs) * tile
        time += 2 * COSTS.launch + max(walked, 4 * m * n / COSTS.memory)
    if separate_t:
        # A wide rank leaves it room to read but little at a time.
        slower = (r_pad / 16) ** 1.5
        rate = min(work.programs * COSTS.low_rank_one, COSTS.low_rank_all)
        time += COSTS.launch + slower * 2 * m * n / rate
    return time
