"""What several GPUs measured, as a README shows it: gradients, runs, tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.text import number, text_table

Row = Mapping[str, Any]
_MODELS = {"mamba": "Mamba", "mamba2": "Mamba-2", "nemotron_h": "Nemotron-H"}
_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def part_text(part: str, rows: Sequence[Row], device: str) -> str:
    """A part of ``distributed.json`` in Markdown: what it says, and its table."""
    text = {"gradients": _gradients, "runs": _runs, "sharded": _speed, "scaling": _speed}[part]
    title = {
        "gradients": "Adapter gradients of models with four layers, 8 × 512 tokens, {device}: how "
        "far from those of one GPU that accumulates the two halves of the batch, in units of 2⁻²³ "
        "of a gradient's norm: the median of the adapter's tensors, and the farthest; *equal* "
        "where all have the same bits.",
        "runs": "Runs of `prodial finetune`, {device}: how far a loss is from the same step's at "
        "most, relative.",
        "sharded": "Tokens a second of 4 × 2048 tokens a GPU, bf16, {device}, with the frozen "
        "weights divided; *moved* is what NCCL or copies took, and how much of it beside other "
        "kernels.",
        "scaling": "The same with the whole model on each GPU.",
    }[part]
    failed, good = ([r for r in rows if ("error" in r) is failing] for failing in (True, False))
    said = "".join(f"\n\nFailed: {place_of(r)}: {r['error'].splitlines()[0]}." for r in failed)
    return f"{title.format(device=device)}\n\n{text(good)}{said}"


def place_of(row: Row) -> str:
    """Where in a table a row is, in words."""
    names = ("part", "model", "dtype", "base", "way")
    return " ".join(str(row[name]) for name in names if row.get(name))


def _gradients(rows: Sequence[Row]) -> str:
    cases, ways = (
        [*dict.fromkeys(found)] for found in (map(_case, rows), (r["way"] for r in rows))
    )
    cells = {(row["way"], _case(row)): _apart(row) for row in rows}
    return text_table(
        ["", *cases], [[way, *(cells.get((way, case), "–") for case in cases)] for way in ways]
    )


def _apart(row: Row) -> str:
    if row["equal"] == row["parameters"]:
        return "equal"
    return f"{_short(row['median_ulps'])} ({_short(row['ulps'])})"


def _short(ulps: float) -> str:
    return f"{ulps:,.0f}" if ulps >= 10 else f"{ulps:.2g}"


def _case(row: Row) -> str:
    name = _MODELS.get(row.get("model", ""), row.get("model", ""))
    quantised = row.get("base", "dense") != "dense"
    return f"{name} {row['base'] if quantised else _DTYPES.get(row.get('dtype', ''), '')}".strip()


def _runs(rows: Sequence[Row]) -> str:
    lines = [[row["what"], _of_run(row)] for row in rows]
    return text_table(["", "losses apart"], lines)


def _of_run(row: Row) -> str:
    if "exit" in row:
        return f"ended after {row['seconds']:.1f} s"
    return "equal" if row["equal"] else f"{row['farthest_loss']:.1e}"


def _speed(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["model"], str(row["processes"]), row["way"] or "whole", f"{row['ms']:.1f}",
            f"{row['tokens_per_second']:,.0f}", number(row.get("over_one"), 3),
            number(row["peak_gb"], 1), _moved(row),
        ]
        for row in rows
    ]  # fmt: skip
    headers = [
        "model",
        "GPUs",
        "weights",
        "ms a step",
        "tokens/s",
        "× one",
        "peak, GB",
        "moved, ms",
    ]
    return text_table(headers, lines)


def _moved(row: Row) -> str:
    """Milliseconds of NCCL and of copies, and how many of them beside other kernels."""
    found = [
        f"{row[f'{kind}_ms']:.0f} ({row[f'{kind}_beside_others_ms']:.0f})"
        for kind in ("nccl", "copies")
        if row.get(f"{kind}_ms", 0) >= 0.5
    ]
    return " + ".join(found) or "–"
