"""What forward launches, decided once from sizes alone. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from prodial_kernels.kernels.choices.costs import COSTS, HALF_STEP
from prodial_kernels.kernels.choices.panels import (
    WORTH,
    Panels,
    column_panels,
    finer_end,
    low_rank_first,
    rounds_of,
)
from prodial_kernels.kernels.choices.partition import ceil_div, fold_programs
from prodial_kernels.kernels.choices.tile_sizes import (
    MAX_FUSED_RANK,
    TALL,
    WIDE,
    DeviceLimits,
    GemmConfig,
    LowRankConfig,
    choose_low_rank,
    choose_low_rank_parts,
    pdl_pays,
    pointer_gemm,
    tiles_of,
)

NARROW = GemmConfig(64, 64, 32, num_warps=4, num_stages=3)
"""A tile that finds room on a multiprocessor beside one of ``WIDE``."""

# The widest result whose product also computes H, by the widest padded rank: it costs 8 to 17% of
# that, as much as the pass over X that it saves at these widths. With many tokens that pass reads
# as fast as the memory can, and less is saved (H200, LOG.md of 2026-11-30).
_FUSED_COLUMNS = {32: 3072, MAX_FUSED_RANK: 2048}
_MANY_TOKENS, _FUSED_COLUMNS_OF_MANY = 8192, {32: 1024, MAX_FUSED_RANK: 2048}
# The widest padded rank whose H is made by the first panel's product alone: wider ones were not
# measured.
_PANELS_RANK = 32


@dataclass(frozen=True)
class ForwardPlan:
    """What forward launches.

    Attributes:
        gemm: Tile sizes of the product; ``pdl`` where the launch before is worth triggering it.
        fused_low_rank: Whether H = X Aᵀ is computed within the product, that of the first panel,
            else by a separate pass.
        on_activations: Whether U = X D_bᵀ is made and the product applies s, else V = s ⊙ (W D_b).
        panels: The column panels that V is made in: (first column, how many) of each.
        tail_columns: How many of the last columns narrow tiles compute on a second stream.
        low_rank: Where H is separate, the tile sizes of its sums by parts; None for a walk over X.
        rest: Tile sizes of the last panel where they are others.
    """

    gemm: GemmConfig
    fused_low_rank: bool
    on_activations: bool
    panels: tuple[tuple[int, int], ...]
    tail_columns: int
    low_rank: LowRankConfig | None = None
    rest: GemmConfig | None = None


@lru_cache(maxsize=1024)
def choose_forward(
    m: int,
    n: int,
    k: int,
    *,
    r_pad: int | None,
    block_size: int | None,
    scale: bool,
    dropout: bool,
    x_channel_first: bool,
    y_channel_first: bool,
    aligned: bool,
    limits: DeviceLimits,
) -> ForwardPlan:
    """Return the plan of forward for X [m, k] and Y [m, n].

    Args:
        m: Tokens.
        n: Columns of Y.
        k: Columns of X.
        r_pad: Padded rank, or None without a LoRA term.
        block_size: P, or None without blocks.
        scale: Whether there is a scale.
        dropout: Whether a mask is drawn for H.
        x_channel_first: Whether X is channel-first.
        y_channel_first: Whether Y is, which the product then computes as [n, m].
        aligned: Whether the copy engine can load X, W and all that is made of them.
        limits: Of the device.
    """
    blocks, lora = block_size is not None, r_pad is not None
    # The product reads X as it is, and its H is of tokens by rows.
    fusable = r_pad is not None and not dropout and not y_channel_first and aligned
    fusable_first = fusable and not x_channel_first
    fusable = fusable and fuses_low_rank(m, n, r_pad or 0, limits.capability)
    on_activations = applies_to_activations(
        m, n, blocks=blocks, scale=scale, channel_first=x_channel_first, fused_low_rank=fusable
    )
    fused = fusable and not (on_activations and blocks)
    config = choose_gemm(*((n, m) if y_channel_first else (m, n)), limits, whole=y_channel_first)
    folds = (blocks or scale) and not on_activations
    panels = column_panels(m, n, 2 * k, config) if folds else ((0, n),)
    tail = 0
    if len(panels) == 1 and not y_channel_first and not fused:
        tail = tail_columns(m, n, config, limits.processors)
    rest = None
    if folds and panels == ((0, n),) and not (tail or y_channel_first):
        config, panels, rest = _wide_and_finer(m, n, k, config, limits)
    if fusable_first and not fused and folds:
        of_h = _low_rank_first(m, n, k, r_pad or 0, panels, tail, config)
        fused, panels = of_h != panels, of_h
    low_rank = None
    if r_pad is not None and not fused and not dropout and not x_channel_first:
        low_rank = choose_low_rank_parts(
            m, k, r_pad, scales=on_activations and block_size == 1,
            capability=limits.capability,
        )  # fmt: skip
    # PDL is safe only directly behind a launch of ours, and not while a side stream is forked.
    pdl = False
    if (folds or blocks or lora) and not tail:
        separate = r_pad is not None and not fused and low_rank is None
        rows = m if on_activations else panels[0][1]
        before = fold_programs(rows, k, block_size or 1, beside_low=separate)
        if low_rank is not None and on_activations and (block_size or 1) == 1:
            # The sum of the parts, few and short.
            before = 0
        if separate:
            before += ceil_div(m, choose_low_rank(m, r_pad or 0, dropout=dropout)[0])
        pdl = pdl_pays(
            config, before, block_size=block_size or 1, beside_low=separate,
            processors=limits.processors,
        )  # fmt: skip
    return ForwardPlan(
        replace(config, pdl=pdl), fused, on_activations, panels, tail, low_rank, rest
    )


def _low_rank_first(
    m: int, n: int, k: int, r_pad: int, panels: Panels, tail: int, config: GemmConfig
) -> Panels:
    """Return the panels with a first one whose product makes H, where that spares a pass over X.

    Of many tokens and no more columns than X has: of more, the pass takes hardly longer than V,
    which the same launch makes (predicted 14, found 1 µs at 16384, 2048, 8192).
    """
    wide = config.block_m == WIDE.block_m and config.programs
    if not wide or m < _MANY_TOKENS or n > k or r_pad > _PANELS_RANK:
        return panels
    *others, (at, width) = panels
    *split, (at, width) = low_rank_first((*others, (at, width - tail)), m, config)
    found = (*split, (at, width + tail))
    always, by_rank = COSTS.wide_low_rank
    rounds = rounds_of(config, m, found[0][1])
    within = COSTS.wide_step * k / 1e3 * rounds * (always + by_rank * r_pad / 16)
    separate = 2 * m * k / COSTS.memory
    return found if separate - within - COSTS.launch > WORTH else panels


def _wide_and_finer(
    m: int, n: int, k: int, config: GemmConfig, limits: DeviceLimits
) -> tuple[GemmConfig, Panels, GemmConfig | None]:
    """Return wide tiles for whole rounds and finer ones for the rest, where that is faster.

    In the place of tall tiles: (tile sizes, panels of V, tile sizes of the last).
    """
    if config.block_m != TALL.block_m or config.block_n != TALL.block_n:
        return config, ((0, n),), None
    wide = replace(WIDE, programs=limits.processors, flatten=True)
    panels, rest = finer_end(((0, n),), m, wide)
    step = COSTS.wide_step * k / 1e3
    taken = step * rounds_of(wide, m, panels[0][1]) + HALF_STEP * k / 1e3 + COSTS.launch
    tall = step * COSTS.tall_round * rounds_of(config, m, n)
    if rest is None or tall - taken < WORTH:
        return config, ((0, n),), None
    return wide, panels, rest


def choose_gemm(m: int, n: int, limits: DeviceLimits, *, whole: bool = False) -> GemmConfig:
    """Return the tile sizes for the forward product [m, n] of 16-bit operands.

    Measured on an H100 (benchmarks/results); other devices get sizes that fit them all. ``whole``
    leaves :func:`tail_columns` out of account.
    """
    if limits.capability[0] != 9:
        # Within the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
        return pointer_gemm(64)
    tail = 0 if whole else tail_columns(m, n, WIDE, limits.processors)
    # The product runs in rounds of whole tiles.
    wide = ceil_div(tiles_of(WIDE, m, n - tail), limits.processors)
    tall = COSTS.tall_round * ceil_div(tiles_of(TALL, m, n), limits.processors)
    return replace(WIDE if wide <= tall else TALL, programs=limits.processors, flatten=True)


def fuses_low_rank(m: int, n: int, r_pad: int, capability: tuple[int, int]) -> bool:
    """Whether H = X Aᵀ of rank r_pad is computed within a Hopper's product [m, n]."""
    widths = _FUSED_COLUMNS if m < _MANY_TOKENS else _FUSED_COLUMNS_OF_MANY
    widest = next((n for rank, n in widths.items() if r_pad <= rank), 0)
    return capability[0] == 9 and n <= widest


def applies_to_activations(
    m: int,
    n: int,
    *,
    blocks: bool,
    scale: bool,
    channel_first: bool,
    fused_low_rank: bool = False,
) -> bool:
    """Whether forward makes U = X D_bᵀ and scales the product, instead of V = s ⊙ (W D_b).

    Either is read and written once beside the product, so D_b is applied to the smaller of X [m, k]
    and W [n, k]; without blocks neither is needed. With U the product does not read X, and so H
    cannot be fused. Nor is D_b applied to the rows of a channel-first X. ``fused_low_rank``: H is
    computed within the product if V is made.
    """
    if channel_first:
        return scale and not blocks
    if not blocks:
        return scale
    return (2 * m if fused_low_rank else m) < n


def tail_columns(m: int, n: int, config: GemmConfig, processors: int) -> int:
    """Return how many of the last columns of an [m, n] product narrow tiles had better compute.

    The last column of tiles costs as much as any other, however few of its columns there are. Where
    it needs a round of its own, narrow tiles compute what it holds, beside the others.
    """
    rest = n % config.block_n if n > config.block_n else 0
    if config.block_n != WIDE.block_n or not config.tma or not 0 < rest <= 2 * NARROW.block_n:
        return 0
    rounds = ceil_div(tiles_of(config, m, n), processors)
    return rest if ceil_div(tiles_of(config, m, n - rest), processors) < rounds else 0
