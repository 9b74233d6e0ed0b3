"""``--memory-budget``: what "8GiB" means. Reads no other module and loads no PyTorch."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgt", start=1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)},
}


# No model trains in less: whoever writes a smaller size has left out its unit.
_LEAST = 2**20
_MOST = 2**60


def parse_budget(text: str) -> int:
    """Return the bytes of ``"8GiB"`` (2³⁰), ``"6GB"`` (10⁹), ``"900 MiB"`` or ``"8589934592"``.

    Raises:
        ValueError: Not a number with one of these units, or no size that memory has.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match.group(2).lower())
    size = 0 if match is None or unit is None else int(float(match.group(1)) * unit)
    if match is None or unit is None or size <= 0 or size > _MOST:
        raise ValueError(
            f"expected a size such as '8GiB', '6GB' or a number of bytes, got {text!r:.60}"
        )
    if size < _LEAST:
        meant = f"; did you mean '{match.group(1)}GB'?" if unit == 1 else ""
        raise ValueError(f"{text!r} is {size:,} bytes, too few for any model{meant}")
    return size


def size_text(size: int) -> str:
    """Return bytes as people read them: ``3.21 GiB``, ``215 MiB``."""
    if size >= 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
