"""Which column panels a weight is made in for a product. Imports no Triton.

In this file ``features`` is what a product has beside its tokens, columns of its result or rows
where it is channel-first, and a panel is (first feature, how many).
"""

from __future__ import annotations

from dataclasses import replace

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import HALF, GemmConfig, tiles_of

Panels = tuple[tuple[int, int], ...]

# A column panel of a weight that is made for a product: at most so many bytes, so that it stays in
# L2 (50 MB on an H100), where the product has at least so many tokens; and the share of its rounds
# of tiles that the product may take more for it.
PANEL_BYTES, PANEL_TOKENS, _PANEL_COST = 24 * 2**20, 8192, 0.04
# What one more panel has to save, in µs: at 16384, 768, 3072 a predicted 4.9 were 4 lost, at 8192,
# 2048, 8192 a predicted 7.7 were 7 saved (H200).
WORTH = 6.0


def rounds_of(config: GemmConfig, m: int, columns: int) -> int:
    """How many rounds of tiles its programs take for an [m, columns] result."""
    return ceil_div(tiles_of(config, m, columns), config.programs)


def column_panels(m: int, features: int, row_bytes: int, config: GemmConfig) -> Panels:
    """Split a weight that is made for a product of many tokens.

    The product of a panel follows before the next is made, in the same memory. Panels fill whole
    rounds of tiles; where that cannot be, there is one of all.

    Args:
        m: Tokens.
        features: See above.
        row_bytes: Bytes of the weight for one of them.
        config: Tile sizes and programs of the product.
    """
    whole = ((0, features),)
    if m < PANEL_TOKENS or features * row_bytes <= PANEL_BYTES or not config.programs:
        return whole
    most = max(1, PANEL_BYTES // (row_bytes * config.block_n))
    fills = {
        columns: columns / rounds_of(config, m, columns * config.block_n)
        for columns in range(most // 2 + 1, most + 1)
    }
    step = (
        min(c for c, fill in fills.items() if fill >= 0.99 * max(fills.values())) * config.block_n
    )
    parts = tuple((first, min(step, features - first)) for first in range(0, features, step))
    taken = sum(rounds_of(config, m, columns) for _, columns in parts)
    return parts if taken <= (1 + _PANEL_COST) * rounds_of(config, m, features) else whole


def low_rank_first(panels: Panels, m: int, config: GemmConfig) -> Panels:
    """Split the first panel so that L, made within its product alone, is made beside few tiles.

    As few as fill a round; the panels are left as they are where they would take a round more.
    """
    columns = config.programs // ceil_div(m, config.block_m) * config.block_n
    (_, first), *others = panels
    if not 0 < columns < first:
        return panels
    one, left, all_of_it = (rounds_of(config, m, c) for c in (columns, first - columns, first))
    if one + left > all_of_it:
        return panels
    return ((0, columns), (columns, first - columns), *others)


def finer_end(panels: Panels, m: int, config: GemmConfig) -> tuple[Panels, GemmConfig | None]:
    """Split off the columns of the last panel for which wide tiles would begin a round.

    Returns:
        (panels, tile sizes of the last one where they are others than ``config``).
    """
    *others, (first, width) = panels
    columns = (rounds_of(config, m, width) - 1) * config.programs // ceil_div(m, config.block_m)
    columns *= config.block_n
    end = replace(HALF, programs=config.programs)
    if not 0 < columns < width or rounds_of(end, m, width - columns) != 1:
        return panels, None
    return (*others, (first, columns), (first + columns, width - columns)), end


def two_panels(m: int, features: int, config: GemmConfig) -> tuple[Panels, int] | None:
    """Halve a weight, about, without another round of tiles.

    Returns:
        (panels, the programs that this takes, maybe more than ``config`` has), or None where there
        is one round or one column of tiles.
    """
    rows, columns = ceil_div(m, config.block_m), ceil_div(features, config.block_n)
    rounds = rounds_of(config, m, features)
    found: list[tuple[int, int]] = []
    for larger in range(ceil_div(columns, 2), min(columns // 2 + 2, columns)):
        for one in range(1, rounds):
            programs = max(
                ceil_div(rows * larger, one), ceil_div(rows * (columns - larger), rounds - one)
            )
            found.append((programs, larger))
    if not found:
        return None
    programs, larger = min(found)
    width = larger * config.block_n
    return ((0, width), (width, features - width)), programs
