"""Tables and figures as text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left, in Markdown's form."""
    widths = [max(len(line[i]) for line in [headers, *lines]) for i in range(len(headers))]

    def join(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = (
        "|"
        + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
        + "|"
    )
    return "\n".join([join(headers), rule, *map(join, lines)])


def number(value: float | None, digits: int = 2, times: float = 1.0) -> str:
    """A figure, or a dash for one that was not measured."""
    return "–" if value is None else f"{value * times:.{digits}f}"
