"""What a run says for itself at the end: its results, the table, the loss curve, peak memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.config import ProdialConfig
from prodial_kernels.methods import METHODS
from prodial_kernels.training.merging import Agreement

# What each metric is called, for people, and how it is written; the first is the headline.
_SHOWN = {
    "bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "loss": ("held-out loss, nats per token", "{:.4f}"),
    "perplexity": ("held-out perplexity", "{:.2f}"),
    "acc": ("held-out accuracy", "{:.2%}"),
    "acc_norm": ("held-out accuracy, length-normalised", "{:.2%}"),
}


_METHOD_NAMES = {"prodial": "ProDiaL", "lora": "LoRA", "full": "full fine-tuning"}


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def method_text(
    method: str, methods: Sequence[Mapping[str, Any]] | None, rank: int | None = None
) -> str:
    """Return what a run trains, for people: with a list of methods, what is said of each."""
    if methods is None:
        return _METHOD_NAMES[method] + (f" of rank {rank}" if rank else "")
    plain = {"prodial": ProdialConfig().to_dict()}
    plain |= {name: kind().to_dict() for name, kind in METHODS.items()}
    texts = []
    for each in methods:
        name = each["name"]
        given = {k: v for k, v in each.items() if plain[name].get(k) != v and k != "name"}
        given.pop("lora_alpha" if each.get("lora_alpha") == each.get("r") else "alpha", None)
        values = (f"{k}={_value_text(v)}" for k, v in given.items())
        texts.append(" ".join([_METHOD_NAMES.get(name, name), *values]))
    return "; ".join(texts)


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run came to.

    Attributes:
        method: ``"prodial"``, ``"lora"``, ``"full"``, the name of a method, or ``"combined"``.
        rank: Rank of the adapter; None for full fine-tuning and with a list of methods.
        before: Held-out metrics of the pretrained model, as the metrics' dataclass names them.
        after: The same of what is written, after training.
        trainable: Trained parameters.
        total: All parameters, the adapter included.
        steps: Optimiser steps that were taken.
        tokens: Input tokens trained on.
        train_seconds: Wall time of the training steps.
        seconds: Wall time of this process, loading, evaluation and merging included.
        peak_bytes: Peak memory: of the process on a CPU, allocated by PyTorch on CUDA.
        memory: The memory plan, what was measured, and their ratio, where there was a plan.
        device: ``"cpu"`` or ``"cuda"``.
        implementation: What the adapted projectors ran by, and why; None for full fine-tuning.
        processes: How many trained together; ``peak_bytes`` and ``memory`` are of the first.
        agreement: How well the written model agrees with the trained one; where there is none, the
            written adapter.
        best: The best held-out metrics of the run, with their step.
        data: What was trained on: its name, how many examples, how many were cut, and what reading
            changed, left out or guessed.
        versions: Of the packages that decide what a run computes.
        output: Directory of the run.
        adapter_dir: The adapter; None for full fine-tuning.
        model_dir: The merged (or fully fine-tuned) model in transformers' format; None where a
            method cannot be merged into one.
        kept_step: The step after which parameters are as written: the last, or, with
            ``keep="best"``, that of the best evaluation. None where an earlier version wrote it.
        planned_steps: Steps that were asked for: more than ``steps`` where a callback ended it.
        methods: The list of methods, where the configuration has one.
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
    model_dir: Path | None
    best: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    implementation: str | None = None
    kept_step: int | None = None
    planned_steps: int | None = None
    processes: int = 1
    methods: Sequence[Mapping[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        values = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        lines = comparison_rows(self.before, self.after)
        percent = 100 * self.trainable / self.total
        lines += [
            ("method", method_text(self.method, self.methods) + rank),
            ("trainable parameters", f"{self.trainable:,} of {self.total:,} ({percent:.2f}%)"),
            ("training", f"{self._steps_text} steps, {self.tokens:,} tokens, "
                         f"{self.tokens / max(self.train_seconds, 1e-9):,.0f} tokens/s"
                         f"{f' by {self.processes} processes' if self.processes > 1 else ''}"),
            ("time", _times(self.seconds, self.train_seconds)),
            ("peak memory", f"{self.peak_bytes / 2**20:,.0f} MiB "
                            f"({'process' if self.device == 'cpu' else 'GPU'})"),
        ]  # fmt: skip
        if self.implementation is not None:
            lines.append(("projectors", self.implementation))
        if self.memory is not None:
            predicted = self.memory["plan"]["allocated"] / 2**20
            ratio = f"measured / predicted: {self.memory['ratio']:.2f}"
            lines.append(("predicted memory", f"{predicted:,.0f} MiB ({ratio})"))
        written = "adapter" if self.model_dir is None else "merged"
        lines.append((f"{written} = trained", str(self.agreement)))
        if self.adapter_dir is not None:
            lines.append(("adapter", str(self.adapter_dir)))
        if self.model_dir is None:
            lines.append(("merged", "none: not every method can be, see above"))
        else:
            lines.append(("model", str(self.model_dir)))
        if self.kept_step not in (None, self.steps):
            lines.append(("written", f"step {self.kept_step:,}, the best evaluation"))
        lines += _doubts(self.before, self.best, self.after)
        cut = self.data.get("rows_cut", 0)
        if cut:
            lines.append(("warning", f"{cut:,} of {self.data['train']:,} rows were cut, see above"))
        shortened = self.after.get("n_truncated", 0)
        if shortened:
            lines.append(("warning", f"{shortened:,} held-out contexts lost their start: raise "
                                     "seq_len to have them evaluated whole"))  # fmt: skip
        return two_columns(lines)

    @property
    def _steps_text(self) -> str:
        early = self.planned_steps is not None and self.steps < self.planned_steps
        return f"{self.steps:,} of {self.planned_steps:,}" if early else f"{self.steps:,}"


def _doubts(
    before: Mapping[str, Any], best: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return a row where training has made the model worse, or was better before its end."""
    name, better = _headline(after)
    if before.get(name) is None or best.get(name) is None or after.get(name) is None:
        return []
    title, form = _SHOWN[name]
    if after.get("step") == 0:
        return [("warning", f"{title} never got better than it was: what is written is unchanged")]
    if better * (after[name] - before[name]) < 0:
        advice = "try fewer steps, a lower learning rate or more data"
        return [("warning", f"{title} got worse in training; {advice}")]
    if better * (best[name] - after[name]) > 0:
        shown = f"{form.format(best[name])} at step {best['step']}"
        return [
            (
                "note",
                f"{title} was best, {shown}; what is saved is step {after['step']}"
                " (keep best would keep it)",
            )
        ]
    return []


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


def _times(seconds: float, train_seconds: float) -> str:
    if train_seconds > seconds:
        return f"{duration(seconds)} since it was resumed; {duration(train_seconds)} of training"
    return f"{duration(seconds)} ({duration(train_seconds)} of it training)"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of the process, or of PyTorch's CUDA allocator.

    0 for a process of a system that does not keep count, as Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def best_evaluation(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the evaluation with the best headline metric; the earliest of equal ones."""
    best = evaluations[0]
    for record in evaluations[1:]:
        if improves(record, best):
            best = record
    return best


def improves(metrics: Mapping[str, Any], best: Mapping[str, Any], *, least: float = 0.0) -> bool:
    """Whether an evaluation is better than another one, by more than ``least``.

    By bits per byte where both have them, else by accuracy; what is not a number is never better.
    """
    name, better = _headline(metrics, best)
    new, old = metrics.get(name), best.get(name)
    return new is not None and (old is None or better * (new - old) > least)


def _headline(*all_metrics: Mapping[str, Any]) -> tuple[str, int]:
    """The metric that evaluations are compared by, and the sign of a change for the better."""
    if any(metrics.get("bits_per_byte") is not None for metrics in all_metrics):
        return "bits_per_byte", -1
    return "acc", 1
