"""How a kernel's programs share a matrix among them. Imports no Triton."""

# Rows of a weight, or of tokens, that one program folds.
FOLD_ROWS = 32


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_window(least: int, block_size: int) -> int:
    """Columns that a program sees: a power of two, ``least`` or the first that holds a block."""
    return max(least, 1 << (block_size - 1).bit_length())


def block_programs(k: int, window: int, block_size: int) -> int:
    """How many programs share k columns, each owning the whole blocks within ``window``."""
    return ceil_div(k, window // block_size * block_size)


def fold_window(block_size: int) -> int:
    """The window of a program that folds."""
    return 256 if block_size == 1 else block_window(64, block_size)


def fold_programs(rows: int, k: int, block_size: int) -> int:
    """How many programs fold [rows, k] with blocks of ``block_size``."""
    return ceil_div(rows, FOLD_ROWS) * block_programs(k, fold_window(block_size), block_size)


def split_tokens(m: int, columns: int, block_m: int, programs: int) -> tuple[int, int]:
    """Split the sum over m tokens so that ``columns`` times the splits is at most ``programs``.

    Fixed by the shape alone, not by the device, so that results repeat across devices.

    Returns:
        (number of splits, tokens in each: a multiple of ``block_m``).
    """
    wanted = max(1, min(programs // columns, ceil_div(m, block_m)))
    rows = ceil_div(ceil_div(m, wanted), block_m) * block_m
    return ceil_div(m, rows), rows
