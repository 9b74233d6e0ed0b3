"""``finetune``: the whole run, from a configuration to a checked model on disk.

result = finetune(FinetuneConfig(model="path/to/mamba", data="notes.txt", steps=500))
print(result)
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prodial_kernels.checkpoint import model_fingerprint, save_adapter
from prodial_kernels.mixers.inject import merge_prodial
from prodial_kernels.training.atomic import atomic_text
from prodial_kernels.training.batches import TrainingBatches
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.data import DataSplit, load_documents, make_batches
from prodial_kernels.training.evaluate import evaluate_examples
from prodial_kernels.training.interrupt import StopSignals
from prodial_kernels.training.loop import (
    LoopOptions,
    NonFiniteLossError,
    StepRecord,
    train,
)
from prodial_kernels.training.merging import Agreement, check_written_model, logits_of, write_model
from prodial_kernels.training.method import PreparedMethod, prepare_method
from prodial_kernels.training.metrics import MetricsLog, read_metrics
from prodial_kernels.training.model import LoadedModel, load_model, resolve_device, resolve_dtype
from prodial_kernels.training.progress import Progress
from prodial_kernels.training.report import (
    METHOD_NAMES,
    FinetuneResult,
    finite_or_none,
    peak_memory,
    plot_loss,
)
from prodial_kernels.training.run import (
    RunDirectory,
    RunIdentity,
    check_same_config,
    check_same_identity,
)
from prodial_kernels.training.schemas import Example
from prodial_kernels.training.state import (
    Position,
    StateError,
    load_state,
    save_state,
    saved_states,
)
from prodial_kernels.training.steps import make_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finetune(
    config: FinetuneConfig, *, resume: bool = False, progress: bool = True
) -> FinetuneResult:
    """Fine-tune a model, evaluate it before and after, save it, and check what was saved.

    The directory ``config.output`` gets ``run.json`` (what this run is), ``metrics.jsonl``,
    ``loss.png``, ``results.json``, ``state/`` (to resume from), ``adapter/`` and ``merged/`` (or,
    for ``method="full"``, ``model/``), a model in transformers' format.

    Args:
        config: What to do.
        resume: Continue the run in ``config.output`` from its newest saved state.
        progress: Show progress on stderr.

    Returns:
        What came out; prints as a table.

    Raises:
        ConfigError: An option that cannot be used.
        DataError: The data cannot be used.
        ModelError: The model or the device cannot be used.
        RunError: The directory holds a run already or, with ``resume``, another run or none.
        NonFiniteLossError: Training diverged; the last saved state is kept.
        MergeError: The written model does not compute what was trained.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
        OSError: The disk is full, or a file cannot be written; the last saved state is kept.
    """
    started = time.perf_counter()
    with StopSignals() as signals:
        config = config.resolved()
        folder = RunDirectory(config.output)
        saved = _open_run(folder, config, resume)
        display = Progress(enabled=progress)
        display.say(f"loading model {config.model!r} and data {config.data!r}")
        run = _prepare(config, folder, saved, display)
        with folder.only_one_process():
            position = _restore(run, folder, display) if resume else Position()
            position = _train(run, folder, position, signals, display)
            return _finish(run, folder, position, started, display)


@dataclass(frozen=True)
class _Run:
    """Everything a run needs in memory."""

    config: FinetuneConfig
    loaded: LoadedModel
    split: DataSplit
    batches: TrainingBatches
    method: PreparedMethod
    options: LoopOptions
    device: torch.device
    dtype: torch.dtype

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What forward passes run under; None where the weights are in the compute dtype."""
        full = self.config.method == "full"
        return self.dtype if full and self.dtype != torch.float32 else None


def _open_run(folder: RunDirectory, config: FinetuneConfig, resume: bool) -> RunIdentity | None:
    if not resume:
        folder.check_startable()
        return None
    saved = folder.read_identity()
    check_same_config(folder, saved, config)
    return saved


def _prepare(
    config: FinetuneConfig, folder: RunDirectory, saved: RunIdentity | None, display: Progress
) -> _Run:
    """Load model and data, check or record whose run this is, and apply the method."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    full = config.method == "full"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    split = load_documents(
        config.data,
        held_out_fraction=config.held_out_fraction,
        held_out_source=config.held_out,
        max_bytes=config.max_bytes,
    )
    display.say(str(split))
    loaded = load_model(config.model, device=device, dtype=torch.float32 if full else dtype)
    batches = make_batches(
        split.train, loaded.tokenizer,
        seq_len=_size(config.seq_len), batch_size=_size(config.batch_size), seed=config.seed,
    )  # fmt: skip
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
    if saved is None:
        folder.write_identity(identity)
    if config.gradient_checkpointing:
        _checkpoint_activations(loaded.model, random=bool(config.lora_dropout))
    display.say(str(method.report))
    options = _loop_options(config, batches)
    return _Run(config, loaded, split, batches, method, options, device, dtype)


def _checkpoint_activations(model: PreTrainedModel, *, random: bool) -> None:
    """Recompute activations, ``random`` ones alike; a model that cannot raises ValueError."""
    # transformers renamed it and warns about the old name, which versions before have only.
    enable = getattr(model, "activation_checkpointing_enable", None)
    # Keeping the generator's state costs a wait, and CUDA graphs cannot do it.
    options = {"use_reentrant": False, "preserve_rng_state": random}
    (enable or model.gradient_checkpointing_enable)(options)


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


def _restore(run: _Run, folder: RunDirectory, display: Progress) -> Position:
    """Load the newest state that is whole; begin at step 0 where nothing was saved yet."""
    for path in reversed(saved_states(folder.states)):
        try:
            position = load_state(path, run.loaded.model, run.method.optimizer)
        except StateError as error:
            display.say(f"skipping a damaged state: {error}")
            continue
        display.say(f"resuming after step {position.step} of {run.options.steps}")
        return position
    display.say("no saved state yet: starting from step 0")
    return Position()


def _train(
    run: _Run,
    folder: RunDirectory,
    position: Position,
    signals: StopSignals,
    display: Progress,
) -> Position:
    step = make_step(
        run.loaded.model, run.method.optimizer, run.config,
        device=run.device, autocast_dtype=run.autocast_dtype, say=display.say,
    )  # fmt: skip
    log = MetricsLog(folder.metrics_file, step=position.step)
    events = _Events(run, folder, log, display)
    try:
        with display.training(run.options.steps, position):
            return train(
                run.loaded.model, step, run.batches, run.options, events,
                signals=signals, position=position,
            )  # fmt: skip
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {_last_state(folder)}") from error
    finally:
        step.close()
        log.close()


def _last_state(folder: RunDirectory) -> str:
    states = saved_states(folder.states)
    return f"the last good state is {states[-1]}" if states else "no state was saved before it"


class _Events:
    """What happens around a training step."""

    def __init__(self, run: _Run, folder: RunDirectory, log: MetricsLog, display: Progress) -> None:
        self._run = run
        self._folder = folder
        self._log = log
        self._display = display

    def logged(self, record: StepRecord) -> None:
        self._display.step(record)
        step = record.position.step
        if step % self._run.config.log_every and step != self._run.options.steps:
            return
        self._log.write(
            {
                "kind": "train",
                "step": step,
                "loss": record.loss,
                "lr": record.lr,
                "grad_norm": record.grad_norm,
                "tokens": record.position.tokens,
                "seconds": round(record.position.seconds, 3),
                "tokens_per_second": round(record.tokens_per_second, 1),
            }
        )

    def save(self, position: Position) -> None:
        self._log.flush()
        save_state(
            self._folder.states, position, self._run.loaded.model, self._run.method.optimizer
        )

    def evaluate(self, position: Position) -> None:
        metrics = _evaluate(self._run, self._display)
        self._log.write({"kind": "evaluation", "step": position.step, **metrics})
        headline = "bits_per_byte" if "bits_per_byte" in metrics else "acc"
        self._display.say(f"step {position.step}: held-out {headline} {metrics[headline]:.4f}")


def _evaluate(run: _Run, display: Progress) -> dict[str, Any]:
    autocast = run.autocast_dtype
    with (
        display.evaluating() as advance,
        torch.autocast(run.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        metrics = evaluate_examples(
            run.loaded.model, run.loaded.tokenizer, run.split.held_out,
            seq_len=_size(run.config.seq_len), batch_size=_size(run.config.batch_size),
            max_tokens=run.config.eval_tokens, progress=advance,
        )  # fmt: skip
    return finite_or_none(metrics)


def _finish(
    run: _Run, folder: RunDirectory, position: Position, started: float, display: Progress
) -> FinetuneResult:
    """Save the adapter, write the merged model, check it, draw the curve, sum up."""
    peak = peak_memory(run.device)
    full = run.config.method == "full"
    if not full:
        save_adapter(run.loaded.model, folder.adapter, base_model=run.config.model)
    model_dir = folder.full_model if full else folder.merged
    display.say(f"writing the {'trained' if full else 'merged'} model to {model_dir}")
    agreement = _write_and_check(run, folder)
    records = read_metrics(folder.metrics_file)
    plot_loss(
        records, folder.plot_file, title=f"{METHOD_NAMES[run.config.method]}: {run.split.name}"
    )
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    result = FinetuneResult(
        method=run.config.method,
        rank=None if run.method.adapter is None else run.method.adapter.r,
        before=next((e for e in evaluations if e["step"] == 0), {}),
        after=evaluations[-1],
        trainable=run.method.report.trainable,
        total=run.method.report.total,
        steps=position.step,
        tokens=position.tokens,
        train_seconds=position.seconds,
        seconds=time.perf_counter() - started,
        peak_bytes=peak,
        device=run.device.type,
        agreement=agreement,
        output=folder.path,
        adapter_dir=None if full else folder.adapter,
        model_dir=model_dir,
    )
    atomic_text(folder.results_file, json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _write_and_check(run: _Run, folder: RunDirectory) -> Agreement:
    tokens = run.batches.batch(0).input_ids[:4]
    model = run.loaded.model
    expected = logits_of(model, tokens)
    full = run.config.method == "full"
    path = folder.full_model if full else folder.merged
    if not full:
        merge_prodial(model)
    write_model(model, run.loaded.tokenizer, path, replace=True)
    # Fully fine-tuned weights are written in float32, as they were trained.
    dtype = torch.float32 if full else run.dtype
    return check_written_model(path, tokens, expected, device=run.device, dtype=dtype)


def _size(value: int | None) -> int:
    """Narrow an option that a resolved configuration always has."""
    if value is None:
        raise ValueError("the configuration is not resolved; call config.resolved()")
    return value


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
