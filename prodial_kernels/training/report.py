"""What a run says for itself at the end: its results, the table, the loss curve, peak memory."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from prodial_kernels.training.evaluate import LanguageModelMetrics
from prodial_kernels.training.merging import Agreement
from prodial_kernels.training.multiple_choice import MultipleChoiceMetrics

Metrics: TypeAlias = LanguageModelMetrics | MultipleChoiceMetrics

# What each metric is called, for people, and how it is written; the first is the headline.
_SHOWN = {
    "bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "loss": ("held-out loss, nats per token", "{:.4f}"),
    "perplexity": ("held-out perplexity", "{:.2f}"),
    "acc": ("held-out accuracy", "{:.2%}"),
    "acc_norm": ("held-out accuracy, length-normalised", "{:.2%}"),
}


METHOD_NAMES = {"prodial": "ProDiaL", "lora": "LoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run came to.

    Attributes:
        method: ``"prodial"``, ``"lora"`` or ``"full"``.
        rank: Rank of the adapter; None for full fine-tuning.
        before: Held-out metrics of the pretrained model, as the metrics' dataclass names them.
        after: The same after training.
        trainable: Trained parameters.
        total: All parameters, the adapter included.
        steps: Optimiser steps.
        tokens: Input tokens trained on.
        train_seconds: Wall time of the training steps.
        seconds: Wall time of this process, loading, evaluation and merging included.
        peak_bytes: Peak memory: of the process on a CPU, allocated by PyTorch on CUDA.
        memory: The memory plan, what was measured, and their ratio, where there was a plan.
        device: ``"cpu"`` or ``"cuda"``.
        agreement: How well the written model agrees with the trained one.
        output: Directory of the run.
        adapter_dir: The adapter; None for full fine-tuning.
        model_dir: The merged (or fully fine-tuned) model in transformers' format.
    """

    method: str
    rank: int | None
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    trainable: int
    total: int
    steps: int
    tokens: int
    train_seconds: float
    seconds: float
    peak_bytes: int
    memory: Mapping[str, Any] | None
    device: str
    agreement: Agreement
    output: Path
    adapter_dir: Path | None
    model_dir: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        values = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    def __str__(self) -> str:
        method = METHOD_NAMES[self.method]
        rank = "" if self.rank is None else f", rank {self.rank}"
        lines = comparison_rows(self.before, self.after)
        percent = 100 * self.trainable / self.total
        lines += [
            ("method", method + rank),
            ("trainable parameters", f"{self.trainable:,} of {self.total:,} ({percent:.2f}%)"),
            ("training", f"{self.steps:,} steps, {self.tokens:,} tokens, "
                         f"{self.tokens / max(self.train_seconds, 1e-9):,.0f} tokens/s"),
            ("time", _times(self.seconds, self.train_seconds)),
            ("peak memory", f"{self.peak_bytes / 2**20:,.0f} MiB "
                            f"({'process' if self.device == 'cpu' else 'GPU'})"),
        ]  # fmt: skip
        if self.memory is not None:
            lines.append(("predicted memory", _prediction(self.memory)))
        lines.append(("merged = trained", str(self.agreement)))
        if self.adapter_dir is not None:
            lines.append(("adapter", str(self.adapter_dir)))
        lines.append(("model", str(self.model_dir)))
        return two_columns(lines)


def comparison_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return table rows of the metrics that both sides have."""
    rows = []
    for name, (title, form) in _SHOWN.items():
        if after.get(name) is None:
            continue
        old, new = before.get(name), after[name]
        if old is None:
            rows.append((title, form.format(new)))
            continue
        if "%" in form:
            change = f"{100 * (new - old):+.2f} points"
        else:
            change = f"{100 * (new / old - 1):+.1f}%" if old else "n/a"
        rows.append((title, f"{form.format(old)} -> {form.format(new)} ({change})"))
    return rows


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return table rows of one model's metrics."""
    rows = [
        (title.removeprefix("held-out "), form.format(metrics[name]))
        for name, (title, form) in _SHOWN.items()
        if metrics.get(name) is not None
    ]
    for name in ("n_examples", "n_documents", "n_tokens", "n_bytes"):
        if name in metrics:
            rows.append((name.removeprefix("n_"), f"{metrics[name]:,}"))
    return rows


def two_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Align names and values."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def duration(seconds: float) -> str:
    """Return seconds as people write them: ``2 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _prediction(memory: Mapping[str, Any]) -> str:
    predicted = memory["plan"]["allocated"] / 2**20
    return f"{predicted:,.0f} MiB (measured / predicted: {memory['ratio']:.2f})"


def _times(seconds: float, train_seconds: float) -> str:
    if train_seconds > seconds:
        return f"{duration(seconds)} since it was resumed; {duration(train_seconds)} of training"
    return f"{duration(seconds)} ({duration(train_seconds)} of it training)"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of the process, or of PyTorch's CUDA allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw the training loss, smoothed and raw, and the held-out points as a PNG.

    Args:
        records: Lines of ``metrics.jsonl``.
        path: Where to write the picture.
        title: Its title.

    Raises:
        OSError: The disk is full, or the place cannot be written.
    """
    # The object interface: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"]]
    held_out = [r for r in records if r["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="train, smoothed")
    points = [(r["step"], r["loss"]) for r in held_out if r.get("loss") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color="tab:orange", label="held-out", zorder=3)
        last = held_out[-1]
        # On one text bits per byte are a fixed multiple of nats per token.
        factor = last["bits_per_byte"] / last["loss"]
        second = axes.secondary_yaxis(
            "right", functions=(lambda y: y * factor, lambda y: y / factor)
        )
        second.set_ylabel("held-out bits per byte")
        for record in {held_out[0]["step"]: held_out[0], last["step"]: last}.values():
            axes.annotate(
                f"{record['bits_per_byte']:.3f} bits/byte",
                (record["step"], record["loss"]),
                textcoords="offset points",
                xytext=(8, 8) if record is held_out[0] else (-8, 10),
                ha="left" if record is held_out[0] else "right",
                fontsize=9,
                color="tab:orange",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
                zorder=4,
            )
    accuracies = [(r["step"], r["acc"]) for r in held_out if r.get("acc") is not None]
    if accuracies:
        right = axes.twinx()
        right.plot(*zip(*accuracies, strict=True), "o-", color="tab:green", label="held-out acc")
        right.set_ylabel("held-out accuracy")
        right.legend(loc="lower right")
    axes.legend(loc="upper right")
    figure.savefig(path, format="png")


def smoothed(values: Sequence[float], *, weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for index, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**index))
    return out


def finite_or_none(metrics: Metrics) -> dict[str, Any]:
    """Return metrics as plain values; what JSON cannot hold becomes None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(metrics).items()
    }
