"""How a kernel's programs share a matrix among them. Imports no Triton."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_window(least: int, block_size: int) -> int:
    """Columns that a program sees: a power of two, ``least`` or the first that holds a block."""
    return max(least, 1 << (block_size - 1).bit_length())


def block_programs(k: int, window: int, block_size: int) -> int:
    """How many programs share k columns, each owning the whole blocks within ``window``."""
    return ceil_div(k, window // block_size * block_size)


def fold_tile(block_size: int, *, beside_low: bool = False) -> tuple[int, int]:
    """Rows of a weight, or of tokens, that a program folds, and its window.

    Args:
        block_size: P.
        beside_low: Whether L is made by the same launch, whose code takes registers of all: then
            fewer programs run at a time.
    """
    if block_size > 1:
        return 32, block_window(64, block_size)
    return (32, 256) if beside_low else (16, 128)


def fold_programs(rows: int, k: int, block_size: int, *, beside_low: bool = False) -> int:
    """How many programs fold [rows, k]; see :func:`fold_tile`."""
    height, window = fold_tile(block_size, beside_low=beside_low)
    return ceil_div(rows, height) * block_programs(k, window, block_size)


def split_tokens(m: int, columns: int, block_m: int, programs: int) -> tuple[int, int]:
    """Split the sum over m tokens so that ``columns`` times the splits is at most ``programs``.

    Fixed by the shape alone, not by the device, so that results repeat across devices.

    Returns:
        (number of splits, tokens in each: a multiple of ``block_m``).
    """
    wanted = max(1, min(programs // columns, ceil_div(m, block_m)))
    rows = ceil_div(ceil_div(m, wanted), block_m) * block_m
    return ceil_div(m, rows), rows
