"""What a search came to, as a table, a page and plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prodial_kernels.search.parts import label
from prodial_kernels.search.record import ENDED, FAILED, Record, ranked
from prodial_kernels.training.results import two_columns

_BEST = 10


@dataclass(frozen=True)
class SearchResult:
    """What a search came to. ``str()`` is a table.

    Attributes:
        before: Held-out metrics of the pretrained model.
        records: Every trial that was run, in order.
        planned: How many were to be run.
        parts: What could be switched on.
        unsuited: What could not be in this model, and why.
        max_trainable: Most trained parameters; None for any number.
        output: Directory of the search.
    """

    before: Mapping[str, Any]
    records: Sequence[Record]
    planned: int
    parts: Sequence[str]
    unsuited: Mapping[str, str]
    max_trainable: int | None
    output: Path

    @property
    def best(self) -> Record | None:
        """The best trial; None where none came to its end."""
        return next(iter(ranked(self.records)), None)

    @property
    def best_single(self) -> Record | None:
        """The best trial with one part alone."""
        return next((r for r in ranked(self.records) if len(r.on) == 1), None)

    @property
    def best_combination(self) -> Record | None:
        """The best trial with several parts."""
        return next((r for r in ranked(self.records) if len(r.on) > 1), None)

    @property
    def best_file(self) -> Path:
        """The options of the best trial, as ``prodial finetune --config`` takes them."""
        return self.output / "best.json"

    @property
    def objective(self) -> str:
        """What is compared, for people."""
        return "error" if "acc" in self.before else "bits per byte"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""

        def plain(record: Record | None) -> Any:
            return None if record is None else record.to_dict()

        return {
            "objective": self.objective,
            "before": dict(self.before),
            "planned": self.planned,
            "parts": list(self.parts),
            "unsuited": dict(self.unsuited),
            "max_trainable": self.max_trainable,
            "best": plain(self.best),
            "best_single": plain(self.best_single),
            "best_combination": plain(self.best_combination),
            "records": [record.to_dict() for record in self.records],
        }

    def __str__(self) -> str:
        count = {state: sum(r.state == state for r in self.records) for state in (ENDED, FAILED)}
        kinds = ", ".join(f"{n} {state}" for state, n in count.items() if n)
        rows = [
            ("trials", f"{len(self.records)} of {self.planned}" + (f" ({kinds})" if kinds else "")),
            ("pretrained", f"{self._before:.4f} {self.objective}"),
        ]
        for title, record in (
            ("best combination", self.best_combination), ("best by itself", self.best_single)
        ):  # fmt: skip
            if record is not None:
                rows.append((title, f"{record.value:.4f}: {label(record.on)}, "
                                    f"{record.trainable:,} trained parameters"))  # fmt: skip
        if self.best is not None:
            rows.append(("report", str(self.output / "report.md")))
            rows.append(("to train it", f"prodial finetune --config {self.best_file}"))
        return two_columns(rows)

    def to_markdown(self) -> str:
        """Return the report as a page."""
        lines = ["# A search over combinations of methods", "", "```", str(self), "```", ""]
        lines += [f"## The best of {len(self.records)} trials", "", *self._table(), ""]
        lines += self._differences()
        failed = [record for record in self.records if record.state == FAILED]
        if failed:
            lines += ["## Trials that failed", ""]
            lines += [f"* {r.number}, {label(r.on)}: {_one_line(r.error)}" for r in failed]
            lines.append("")
        if self.unsuited:
            lines += ["## What this model does not take", ""]
            lines += [f"* {name}: {_one_line(why)}" for name, why in self.unsuited.items()]
            lines.append("")
        lines += ["![trials](search.png)", ""]
        return "\n".join(lines)

    @property
    def _before(self) -> float:
        if "acc" in self.before:
            return 1.0 - float(self.before["acc"])
        return float(self.before["bits_per_byte"])

    def _table(self) -> list[str]:
        head = ["trial", "step", "combination", self.objective, "trained", "s", "sizes"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for record in ranked(self.records)[:_BEST]:
            cells = [
                str(record.number), record.step, label(record.on), f"{record.value:.4f}",
                f"{record.trainable:,}", f"{record.seconds:.0f}", _values_text(record.values),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def _differences(self) -> list[str]:
        """What each part does by itself, and in the combinations of step one that have it."""
        first = [r for r in ranked(self.records) if r.step == "methods"]
        alone = {r.on[0]: r for r in first if len(r.on) == 1}
        lines = ["## What each part does, at its default sizes", ""]
        head = ["part", "by itself", "trained", "best combination with it", "best without it"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name in self.parts:
            single = alone.get(name)
            cells = ["–", "–"]
            if single is not None:
                cells = [f"{single.value:.4f}", f"{single.trainable:,}"]
            for within in (True, False):
                best = next((r for r in first if len(r.on) > 1 and (name in r.on) is within), None)
                cells.append("–" if best is None else f"{best.value:.4f}")
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return [*lines, ""]


def _values_text(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
