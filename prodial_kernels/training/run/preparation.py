"""Everything a fine-tuning run needs in memory: model, data, method, memory plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.checkpoint import model_fingerprint
from prodial_kernels.models.layers.recompute import AppliedLevels, prepare_blocks
from prodial_kernels.models.loading.load import (
    LoadedModel,
    load_model,
    resolve_device,
    resolve_dtype,
)
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.data.batches import TrainingBatches
from prodial_kernels.training.data.documents import resets_state
from prodial_kernels.training.data.examples import Example, kind_of
from prodial_kernels.training.data.splits import DataSplit, load_documents, make_batches
from prodial_kernels.training.memory.run_plan import RunPlan, block_levels
from prodial_kernels.training.method import PreparedMethod, prepare_method
from prodial_kernels.training.results import METHOD_NAMES
from prodial_kernels.training.run.directory import RunDirectory, RunIdentity, check_same_identity
from prodial_kernels.training.run.loop import LoopOptions, cut_warm_up
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.run.projectors import implementation_of
from prodial_kernels.training.step.choose import StepChoice


@dataclass(frozen=True)
class Run:
    """Everything a run needs in memory."""

    config: FinetuneConfig
    loaded: LoadedModel
    split: DataSplit
    batches: TrainingBatches
    method: PreparedMethod
    options: LoopOptions
    device: torch.device
    dtype: torch.dtype
    choice: StepChoice
    plan: RunPlan | None
    levels: AppliedLevels
    identity: RunIdentity
    implementation: str | None

    @property
    def evaluation_batch(self) -> int:
        """Sequences that are evaluated at once."""
        return self.batch_size if self.plan is None else self.plan.plan.evaluation_batch

    @property
    def batch_size(self) -> int:
        """Sequences in a micro-batch."""
        return _resolved(self.config.batch_size)

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence."""
        return _resolved(self.config.seq_len)

    @property
    def title(self) -> str:
        """What is trained how on what, in one line."""
        adapter = self.method.adapter
        rank = "" if adapter is None or not adapter.r else f" of rank {adapter.r}"
        path = Path(self.config.model)
        model = path.name if path.is_dir() else self.config.model
        return f"{METHOD_NAMES[self.config.method]}{rank}: {model} on {self.split.name}"

    @property
    def data_record(self) -> dict[str, Any]:
        """What people ask later of the data, as plain JSON-ready values."""
        notes = [*self.split.notes, *self.batches.notes]
        return {**self.split.to_dict(), "rows_cut": self.batches.n_truncated, "notes": notes}

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What forward passes run under; None where the weights are in the compute dtype."""
        full = self.config.method == "full"
        return self.dtype if full and self.dtype != torch.float32 else None


def prepare(
    config: FinetuneConfig,
    folder: RunDirectory,
    saved: RunIdentity | None,
    choice: StepChoice,
    plan: RunPlan | None,
    display: Progress,
) -> Run:
    """Load model and data, check whose run this is, and apply the method; nothing is written.

    Args:
        config: A resolved configuration.
        folder: The run's directory.
        saved: What run is there already; None for a new one.
        choice: How the run takes its steps.
        plan: The run's memory plan, if it has one.
        display: Told what is found.

    Raises:
        DataError: The data cannot be used.
        ModelError: The model or the device cannot be used.
        RunError: The directory holds another run.
        ValueError: The adapter does not fit the model.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    full = config.method == "full"
    split = load_documents(
        config.data,
        held_out_fraction=config.held_out_fraction,
        held_out_source=config.held_out,
        max_bytes=config.max_bytes,
    )
    display.say(str(split))
    loaded = load_model(
        config.model, device=device, dtype=torch.float32 if full else dtype,
        quantize=config.quantize,
    )  # fmt: skip
    if loaded.quantization is not None:
        display.say(str(loaded.quantization))
    apart = config.packing == "documents" and kind_of(split.train) == "text"
    resets = apart and resets_state(loaded.model)
    if apart and not resets:
        display.say("documents are padded one by one: this model cannot reset its state in between")
    batches = make_batches(
        split.train, loaded.tokenizer,
        seq_len=_resolved(config.seq_len), batch_size=_resolved(config.batch_size),
        seed=config.seed, packing=config.packing, resets=resets,
    )  # fmt: skip
    for note in batches.notes:
        display.say(note)
    identity = RunIdentity(
        config=config.to_dict(),
        model=model_fingerprint(loaded.model),
        data=batches.fingerprint,
        held_out=_fingerprint(split.held_out),
        device=device.type,
    )
    if saved is not None:
        check_same_identity(folder, saved, identity)
    torch.manual_seed(config.seed)
    method = prepare_method(loaded.model, config)
    display.say(str(method.report))
    implementation = implementation_of(loaded.model)
    if implementation is not None:
        display.say(f"projectors run by {implementation}")
    if plan is not None:
        display.say(str(plan))
    chosen = block_levels(loaded.model, config.chosen_activations, plan)
    levels = prepare_blocks(loaded.model, chosen, device=device, say=display.say)
    options = _loop_options(config, batches)
    cut = cut_warm_up(options)
    if cut is not None:
        display.say(cut)
    return Run(
        config, loaded, split, batches, method, options, device, dtype, choice, plan, levels,
        identity, implementation,
    )  # fmt: skip


def _loop_options(config: FinetuneConfig, batches: TrainingBatches) -> LoopOptions:
    steps = config.steps
    if steps is None:
        micro_batches = math.ceil((config.epochs or 1.0) * batches.steps_per_epoch)
        steps = math.ceil(micro_batches / config.grad_accumulation)
    return LoopOptions(
        steps=steps,
        lr=config.lr or 0.0,
        schedule=config.schedule or "constant",
        warmup=config.warmup,
        grad_accumulation=config.grad_accumulation,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _resolved(value: int | None) -> int:
    """Narrow an option that a resolved configuration always has."""
    if value is None:
        raise ValueError("the configuration is not resolved; call config.resolved()")
    return value
