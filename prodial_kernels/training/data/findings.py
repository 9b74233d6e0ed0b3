"""What reading data changed, dropped, cut or guessed: counted while it is read, then printed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable


class Findings:
    """Counts, by what happened and to what kind of thing."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._details: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._remarks: list[str] = []

    def count(self, what: str, noun: str, *, n: int = 1, detail: str | None = None) -> None:
        """Count ``n`` things.

        Args:
            what: What happened, such as ``"skipped, not UTF-8 text"``.
            noun: What it happened to, in the singular.
            n: How many.
            detail: What to name in brackets, such as a file's ending.
        """
        if n <= 0:
            return
        self._counts[what, noun] += n
        if detail is not None:
            self._details[what, noun][detail] += n

    def remark(self, text: str) -> None:
        """Keep a sentence that counts nothing; once."""
        if text not in self._remarks:
            self._remarks.append(text)

    def total(self, what: str) -> int:
        """Return how many things ``what`` happened to."""
        return sum(n for (happened, _), n in self._counts.items() if happened == what)

    def lines(self) -> tuple[str, ...]:
        """Return one line for each thing that happened, in the order in which it first did."""
        counted = (
            f"{what}: {n:,} {noun}{'' if n == 1 else 's'}{self._listed(what, noun)}"
            for (what, noun), n in self._counts.items()
        )
        return (*self._remarks, *counted)

    def _listed(self, what: str, noun: str) -> str:
        details = self._details.get((what, noun))
        if not details:
            return ""
        shown = [f"{detail} ×{n}" if n > 1 else detail for detail, n in details.most_common(6)]
        more = ", …" if len(details) > len(shown) else ""
        return f" ({', '.join(shown)}{more})"


def all_lines(findings: Iterable[Findings]) -> tuple[str, ...]:
    """Return the lines of several, each once."""
    return tuple(dict.fromkeys(line for one in findings for line in one.lines()))
