"""The fine-tuning jobs as README.md shows them: a table, and the lines that run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.text import text_table
from benchmarks.training.jobs import FROZEN, GB, LEAST, PEFT, PRODIAL, JobRow
from prodial_kernels.models.layers.recompute import LEVELS


def page(record: Mapping[str, Any]) -> str:
    """The table of a ``finetune.json`` and, in the same order, the commands."""
    rows = rows_of(record)
    # What the least budget is depends on what the plan of the day leaves free.
    commands = [row.command for row in rows if row.command and not row.name.endswith(LEAST)]
    beside = (
        " *Frozen* is the same model at the same levels with nothing to train, *PEFT* its LoRA on "
        "the same projectors, as QLoRA where weights are stored: in bitsandbytes' NF4 but for "
        "head, embeddings and experts, with gradient checkpointing, whole logits and the fast path "
        "off."
        if any(row.method != PRODIAL for row in rows)
        else " *LoRA before* is LoRA on the same projectors of mamba_ssm's blocks, whose fast path "
        "must then be off."
    )
    return "\n\n".join(
        [
            f"Whole steps, loss and optimiser included, both projectors with r = 16, random "
            f"weights of the real dimensions, on an {record['device']}; captured in a CUDA graph, "
            f"but for those called eager. Peaks are those of PyTorch's tensors, in GB of 10⁹ "
            f"bytes; a budget holds the CUDA context as well. `norm` is `recompute` with "
            f"`in_proj`'s output kept.{beside}",
            jobs_table(rows),
            *record.get("notes", ()),
            "The lines in the same order, without those of mamba_ssm's own blocks, which Python "
            "code trains, and of the smallest budgets: a smaller one is refused with the least "
            "that would do.",
            "\n".join(["```bash", *commands, "```"]),
        ]
    )


def rows_of(record: Mapping[str, Any]) -> list[JobRow]:
    """The rows of a ``finetune.json``, of the jobs that ran."""
    return [row for row in (JobRow(**values) for values in record["rows"]) if row.error is None]


def jobs_table(rows: Sequence[JobRow]) -> str:
    """One line for each job that ran, beside its rivals where they did."""
    own = [row for row in rows if row.method == PRODIAL]
    rivals = {row.name: row for row in rows if row.method != PRODIAL}
    beside = ["tokens/s: of frozen, of PEFT", "PEFT, GB"] if rivals else ["LoRA before"]
    headers = [
        "job", *beside, "ms a step", "peak, GB (planned)", "budget", "what the layers keep",
    ]  # fmt: skip
    lines = [
        [
            _title(row), *(_beside(row, rivals) if rivals else [_before(row)]),
            f"{row.ms:.{1 if row.ms < 100 else 0}f}", gigabytes(row).replace(" GB", ""),
            row.memory_budget or "–", levels_text(row.levels),
        ]
        for row in own
    ]  # fmt: skip
    return text_table(headers, lines)


def _beside(row: JobRow, rivals: Mapping[str, JobRow]) -> list[str]:
    """Tokens a second and their shares of the frozen model's and of PEFT's; what PEFT took."""
    shares = [
        f"{row.tokens_per_second / rival.tokens_per_second:.2f}" if rival else "–"
        for rival in (rivals.get(f"{row.name}+{method}") for method in (FROZEN, PEFT))
    ]
    peft = rivals.get(f"{row.name}+{PEFT}")
    return [
        f"{row.tokens_per_second:,.0f}: {', '.join(shares)}",
        "–" if peft is None else gigabytes(peft).replace(" GB", ""),
    ]


def beside_rivals(rows: Sequence[JobRow]) -> list[str]:
    """Tokens a second of jobs that were measured with their rivals, a line each."""
    found = {row.name: row for row in rows if row.error is None}
    lines = []
    for row in found.values():
        rivals = {method: found.get(f"{row.name}+{method}") for method in (FROZEN, PEFT)}
        if row.method != PRODIAL or not any(rivals.values()):
            continue
        parts = [f"{row.tokens_per_second:,.0f} tokens/s"]
        parts += [
            f"{row.tokens_per_second / rival.tokens_per_second:.2f} of {method} "
            f"({rival.tokens_per_second:,.0f}; {gigabytes(rival)})"
            for method, rival in rivals.items()
            if rival is not None
        ]
        lines.append(f"{row.name:22} {', '.join(parts)}")
    return lines


def gigabytes(row: JobRow) -> str:
    """The measured peak, and in parentheses the one that was planned."""
    text = "–" if row.peak_bytes is None else f"{row.peak_bytes / GB:.2f} GB"
    return text if row.predicted_bytes is None else f"{text} ({row.predicted_bytes / GB:.2f})"


def levels_text(levels: Mapping[str, int]) -> str:
    """How many layers are at which level, from the fastest level to the smallest."""
    if len(levels) == 1:
        return f"`{next(iter(levels))}`"
    return ", ".join(f"{levels[level]} `{level}`" for level in LEVELS if level in levels)


def _title(row: JobRow) -> str:
    library = ", mamba_ssm" if row.library == "mamba_ssm" else ""
    experts = ", experts on the host" if row.experts == "host" else ""
    return f"{row.title}{experts}{library}{'' if row.graphed else ', eager'}"


def _before(row: JobRow) -> str:
    ms, gb = row.before
    figures = [f"{ms:g} ms" if ms is not None else "", f"{gb:.1f} GB" if gb is not None else ""]
    return ", ".join(filter(None, figures)) or "–"
