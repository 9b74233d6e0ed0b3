"""Evaluate a loaded model on data of any kind, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prodial_kernels.files.json_values import JsonReport, finite_or_none
from prodial_kernels.models.adapt.inject import merge_prodial
from prodial_kernels.models.adapt.state import is_adapted
from prodial_kernels.models.layers.decoding import biased_projections
from prodial_kernels.models.loading.load import LoadedModel
from prodial_kernels.training.config import STDLIB_EVAL_TOKENS, STDLIB_MAX_BYTES
from prodial_kernels.training.data.examples import Example, kind_of
from prodial_kernels.training.data.sources.objects import GIVEN
from prodial_kernels.training.data.splits import Source, load_documents, read_whole
from prodial_kernels.training.merging import write_model
from prodial_kernels.training.results import metric_rows, two_columns
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.scoring.language_model import evaluate_examples
from prodial_kernels.training.scoring.lm_eval import run_lm_eval
from prodial_kernels.training.scoring.log_likelihood import Scorer


@dataclass(frozen=True)
class Assessment(JsonReport):
    """Metrics of one model on one source. ``str()`` is a table.

    Attributes:
        model: What was evaluated.
        data: What it was evaluated on.
        metrics: By the names of the metrics' dataclass; by task for the harness.
        notes: What reading the data changed, left out, cut or guessed, a line each.
    """

    model: str
    data: str
    metrics: Mapping[str, Any]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        rows = [("model", self.model), ("data", self.data)]
        for name, value in self.metrics.items():
            if isinstance(value, Mapping):
                shown = ", ".join(f"{metric} {score:.4f}" for metric, score in value.items())
                rows.append((name, shown))
        return two_columns([*rows, *metric_rows(self.metrics)])


@dataclass(frozen=True)
class EvaluationData:
    """What a model is to be evaluated on.

    Attributes:
        name: The source and the part of it, for people.
        examples: Of one kind.
        notes: What reading changed, left out, cut or guessed, a line each.
        max_tokens: Stop after so many tokens of text; None for all.
    """

    name: str
    examples: Sequence[Example]
    notes: Sequence[str]
    max_tokens: int | None


def evaluation_data(
    data: Source = "stdlib",
    *,
    split: str | None = None,
    max_tokens: int | None = None,
    limit: float | None = None,
) -> EvaluationData:
    """Read what a model is to be evaluated on.

    Args:
        data: As ``load_documents`` takes it: the name of a source, or rows in memory.
        split: ``"held-out"`` for the part that fine-tuning on the same source holds out, ``"all"``
            for everything (of a hub data set its validation or test part); None for held-out of
            ``"stdlib"`` and all of anything else.
        max_tokens: Stop after so many tokens of text; None for all (of ``"stdlib"``, 32,768).
        limit: Take so many examples, or under 1 such a share of them, at least one.

    Raises:
        DataError: The data cannot be used.
    """
    stdlib = isinstance(data, str) and data == "stdlib"
    if split is None:
        split = "held-out" if stdlib else "all"
    max_bytes = STDLIB_MAX_BYTES if stdlib else None
    examples: Sequence[Example]
    notes: Sequence[str]
    if split == "held-out":
        both = load_documents(data, max_bytes=max_bytes)
        examples, notes = both.held_out, both.notes
    else:
        examples, notes = read_whole(data, max_bytes=max_bytes)
    if limit is not None:
        # The order is a fixed random one, so any beginning is a fair sample.
        n = round(limit * len(examples)) if limit < 1 else int(limit)
        examples = examples[: max(1, n)]
    if max_tokens is None and stdlib:
        max_tokens = STDLIB_EVAL_TOKENS
    named = str(data) if isinstance(data, (str, os.PathLike)) else GIVEN
    source = "Python's standard library" if stdlib else named
    return EvaluationData(f"{source} ({split})", examples, notes, max_tokens)


def assess(
    loaded: LoadedModel,
    data: EvaluationData,
    *,
    seq_len: int = 256,
    batch_size: int = 8,
    progress: bool = True,
) -> Assessment:
    """Evaluate a model: loss and bits per byte, or multiple-choice accuracy.

    Args:
        loaded: The model, with or without an adapter.
        data: What to evaluate it on.
        seq_len: The most tokens that the model reads at once.
        batch_size: Windows in a forward pass.
        progress: Show progress on stderr.

    Raises:
        DataError: The data cannot be used with this model's tokenizer.
        EvaluationError: A log-likelihood is not finite.
    """
    display = Progress(enabled=progress)
    for note in data.notes:
        display.say(note)
    kind = kind_of(data.examples)
    display.say(f"evaluating {loaded.name} on {len(data.examples):,} {kind} examples")
    with display.evaluating(leave=True) as advance:
        scorer = Scorer(
            loaded.model, loaded.tokenizer, seq_len=seq_len, batch_size=batch_size, progress=advance
        )
        metrics = evaluate_examples(scorer, data.examples, max_tokens=data.max_tokens)
    if metrics.n_truncated:
        display.say(
            f"{metrics.n_truncated:,} contexts were longer than seq_len {seq_len} allows and lost "
            "their start"
        )
    return Assessment(loaded.name, data.name, finite_or_none(asdict(metrics)), data.notes)


def assess_with_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    limit: float | None = None,
    include_path: str | os.PathLike[str] | None = None,
) -> Assessment:
    """Evaluate a model on tasks of lm-evaluation-harness; an adapter is merged first, in place.

    The harness reads a directory, so the (merged) model is written to a temporary one. The other
    arguments are those of :func:`~prodial_kernels.training.scoring.lm_eval.run_lm_eval`.

    Raises:
        EvaluationError: The harness is not installed, or fails.
        OSError: The disk is full.
    """
    name, device = loaded.name, next(loaded.model.parameters()).device
    notes = []
    if batch_size > 1 and biased_projections(loaded.model):
        batch_size = 1
        notes.append(
            "texts went through the model one at a time: lm-evaluation-harness pads on the left "
            "for tasks that generate, which a model with a bias in in_proj reads otherwise"
        )
    if is_adapted(loaded.model):
        merge_prodial(loaded.model)
    if limit is not None and limit >= 1:
        limit = int(limit)
    with tempfile.TemporaryDirectory(prefix="prodial-") as folder:
        path = Path(folder, "model")
        with write_model(loaded.model, loaded.tokenizer, path):
            pass
        results = run_lm_eval(
            path, tasks, num_fewshot=num_fewshot, batch_size=batch_size, device=str(device),
            limit=limit, include_path=include_path,
        )  # fmt: skip
    return Assessment(name, "lm-evaluation-harness", results, notes)
