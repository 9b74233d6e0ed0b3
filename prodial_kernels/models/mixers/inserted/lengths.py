"""Whether learned tokens make a sequence just too long for the chunks of mamba_ssm's scan."""

from __future__ import annotations

from torch import nn

# mamba_ssm 2.3, csrc/selective_scan: the least of these that holds a sequence, or chunks of the
# last. A chunk with three tokens in it costs what a full one costs.
_PIECES = (128, 256, 512, 1024, 2048)


def scanned(length: int) -> int:
    """Return how many tokens mamba_ssm's selective scan works through for so many."""
    fits = next((piece for piece in _PIECES if length <= piece), None)
    return fits or -(-length // _PIECES[-1]) * _PIECES[-1]


def costly_length(model: nn.Module, length: int, inserted: int) -> str | None:
    """Return what to say of a length that ``inserted`` tokens lead into another chunk.

    Args:
        model: With Mamba-1 mixers or not: others scan in small chunks.
        length: Tokens of a sequence, without those.
        inserted: Learned tokens beside them.

    Returns:
        A sentence with the length that avoids it; None where there is nothing to say.
    """
    selective = any(hasattr(m, "A_log") and hasattr(m, "x_proj") for m in model.modules())
    before, after = scanned(length), scanned(length + inserted)
    if not selective or before == after or before <= inserted:
        return None
    return (
        f"{length:,} tokens and {inserted} learned ones are scanned as {after:,}: "
        f"{before - inserted:,} would be as {before:,}, in {before / after:.0%} of the scan's time"
    )
