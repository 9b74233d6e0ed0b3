"""A base's card: what it is, what it saw, how well it predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_card"]


def write_card(folder: Path, record: Mapping[str, Any], data: Path) -> None:
    """Write ``README.md`` beside a base.

    Args:
        folder: Of the base.
        record: Of its checkpoint.
        data: What it was pretrained on: a folder with ``corpus.json`` or ``tasks.json``.
    """
    progress, options = record["progress"], record["options"]
    history = progress["history"]
    figures = [k for k in history[-1] if k not in ("step", "seen", "seconds", "loss")]
    unit = "bits per byte" if "english" in figures else "share of wrong classes"
    lines = [
        f"# {record['base']}", "",
        f"{record['parameters']:,} parameters, pretrained from scratch for the study of adapters "
        f"in `benchmarks/quality`: {progress['step']:,} steps of {options['batch_size']} examples "
        f"in {progress['seconds']:.0f} s and {progress['pieces']} pieces on {record['device']} "
        f"(torch {record['torch']}). A base to compare methods on, not a model to use.", "",
        f"Held out, in {unit}, against what was seen (measurements before the last use a part of "
        "the held-out data):", "",
        "| seen | " + " | ".join(figures) + " |",
        "| ---: |" + " ---: |" * len(figures),
    ]  # fmt: skip
    every = max(1, len(history) // 12)
    shown = [*history[:-1:every], history[-1]]
    for line in shown:
        values = " | ".join(f"{line[name]:.4f}" for name in figures)
        lines.append(f"| {line['seen']:,} | {values} |")
    sources = _sources(data)
    if sources:
        lines += ["", "| package | version | licence |", "| --- | --- | --- |"]
        lines += [f"| {s['package']} | {s['version']} | {s['licence']} |" for s in sources]
    lines += ["", "```json", json.dumps(dict(options), sort_keys=True), "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _sources(data: Path) -> list[dict[str, str]]:
    for name in ("corpus.json", "tasks.json"):
        path = data / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            sources: list[dict[str, str]] = (
                found["sources"] if "sources" in found else found["letters"]["sources"]
            )
            return sources
    return []
