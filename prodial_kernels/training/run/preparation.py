"""Everything a fine-tuning run needs in memory: model, data, method, memory plan."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.checkpoint import model_fingerprint
from prodial_kernels.models.layers.packed_rows import arguments_apart
from prodial_kernels.models.layers.recompute import AppliedLevels, prepare_blocks
from prodial_kernels.models.loading.load import LoadedModel
from prodial_kernels.training.config import ResolvedConfig
from prodial_kernels.training.data.batches import TrainingBatches
from prodial_kernels.training.data.examples import Example, kind_of
from prodial_kernels.training.data.splits import DataSplit, load_documents, make_batches
from prodial_kernels.training.distributed.sharding import shard_frozen
from prodial_kernels.training.distributed.world import ONE_PROCESS, World
from prodial_kernels.training.memory.run_plan import RunPlan, block_levels
from prodial_kernels.training.method import PreparedMethod, prepare_method
from prodial_kernels.training.results import method_text
from prodial_kernels.training.run.directory import RunDirectory, RunIdentity, check_same_identity
from prodial_kernels.training.run.implementation import check_implementation, implementation_of
from prodial_kernels.training.run.loop import LoopOptions, cut_warm_up
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.start.given import Given
from prodial_kernels.training.start.initial_adapter import adapter_fingerprint
from prodial_kernels.training.step.choose import ModelFacts, StepChoice, decide
from prodial_kernels.training.step.optimizers import check_optimizer


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on."""

    split: DataSplit
    batches: TrainingBatches


@dataclass(frozen=True)
class Run:
    """Everything a run needs in memory."""

    config: ResolvedConfig
    folder: RunDirectory
    display: Progress
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
    world: World

    @property
    def evaluation_batch(self) -> int:
        """Sequences that are evaluated at once."""
        return self.config.batch_size if self.plan is None else self.plan.plan.evaluation_batch

    @property
    def title(self) -> str:
        """What is trained how on what, in one line."""
        adapter = self.method.adapter
        rank = None if adapter is None else adapter.r
        path = Path(self.config.model)
        model = path.name if path.is_dir() else self.config.model
        method = method_text(self.config.method, self.config.methods, rank)
        return f"{method}: {model} on {self.split.name}"

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


def check_options(config: ResolvedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise if options cannot be used together, or not on this device, whatever the model.

    The errors are those that :func:`~prodial_kernels.training.finetuning.finetune` lists.
    """
    if config.method != "full":
        # A LoRA without a rank gets it from the model: any will do to check the rest.
        config.adapter(r=1)
    check_implementation(config.impl, device, dtype)
    check_optimizer(config.optimizer, device)
    # Of the model no more is known yet.
    decide(config, ModelFacts(draws_numbers=bool(config.lora_dropout)), device)


def prepare(
    config: ResolvedConfig,
    folder: RunDirectory,
    saved: RunIdentity | None,
    display: Progress,
    *,
    device: torch.device,
    dtype: torch.dtype,
    choice: StepChoice,
    plan: RunPlan | None,
    given: Given | None = None,
    world: World = ONE_PROCESS,
    data: RunData | None = None,
) -> Run:
    """Load model and data, check whose run this is, and apply the method; nothing is written.

    ``saved`` is the run that is in ``folder`` already, None for a new one; ``given`` what takes the
    place of names; ``data`` what another run with the same data
    and batches has read; the errors are those of
    :func:`~prodial_kernels.training.finetuning.finetune`.
    """
    given = Given() if given is None else given
    full = config.method == "full"
    split = read_split(config, given, display) if data is None else data.split
    # No device holds a model that is divided among them.
    home = torch.device("cpu") if config.shard else device
    loaded = given.load(config, device=home, dtype=torch.float32 if full else dtype)
    if loaded.quantization is not None:
        display.say(str(loaded.quantization))
    batches = batches_of(config, split, loaded, display) if data is None else data.batches
    begun_with = config.init_adapter
    identity = RunIdentity(
        config=config.to_dict(),
        model=model_fingerprint(loaded.model),
        data=batches.fingerprint,
        held_out=_fingerprint(split.held_out),
        device=device.type,
        init_adapter="" if begun_with is None else adapter_fingerprint(begun_with),
    )
    world.check_same("models, data or options", identity.fingerprint)
    if saved is not None:
        check_same_identity(folder, saved, identity)
    torch.manual_seed(config.seed)
    method = prepare_method(
        loaded.model, config,
        (lambda model: display.say(str(shard_frozen(model, device)))) if config.shard else None,
        drawn_on=device if config.shard else None,
    )  # fmt: skip
    if not world.main:
        # The same initial values, but dropout of its own.
        torch.manual_seed(_seed_of(config.seed, world.rank))
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
        config, folder, display, loaded, split, batches, method, options, device, dtype, choice,
        plan, levels, identity, implementation, world,
    )  # fmt: skip


def read_split(config: ResolvedConfig, given: Given, display: Progress) -> DataSplit:
    """Read and divide a run's data; DataError where it cannot be used."""
    split = load_documents(
        config.data if given.data is None else given.data,
        held_out_fraction=config.held_out_fraction,
        held_out_source=config.held_out if given.held_out is None else given.held_out,
        max_bytes=config.max_bytes,
    )
    display.say(str(split))
    return split


def batches_of(
    config: ResolvedConfig, split: DataSplit, loaded: LoadedModel, display: Progress
) -> TrainingBatches:
    """Make a run's batches for a model; DataError where it cannot read the data."""
    separate = config.packing == "documents" and kind_of(split.train) == "text"
    apart = arguments_apart(loaded.model) if separate else frozenset()
    if separate and not apart:
        display.say("documents are padded one by one: this model cannot reset its state in between")
    batches = make_batches(
        split.train, loaded.tokenizer,
        seq_len=config.seq_len, batch_size=config.batch_size,
        seed=config.seed, packing=config.packing, apart=apart,
    )  # fmt: skip
    for note in batches.notes:
        display.say(note)
    return batches


def _loop_options(config: ResolvedConfig, batches: TrainingBatches) -> LoopOptions:
    return LoopOptions(
        steps=config.optimizer_steps(batches.steps_per_epoch),
        lr=config.lr,
        schedule=config.schedule,
        warmup=config.warmup,
        grad_accumulation=config.grad_accumulation,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )


def _seed_of(seed: int, process: int) -> int:
    digest = hashlib.blake2b(f"{seed}/process {process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
