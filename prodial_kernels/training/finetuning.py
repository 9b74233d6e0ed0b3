"""``finetune``: the whole run, from a configuration to a checked model on disk.

result = finetune(FinetuneConfig(model="path/to/mamba", data="notes.txt", steps=500))
print(result)

Objects can take the place of names: ``finetune(config, model=model, tokenizer=tokenizer,
data=rows)``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from prodial_kernels.checkpoint import save_adapter
from prodial_kernels.files.atomic import atomic_file, atomic_text
from prodial_kernels.files.json_values import finite_or_none
from prodial_kernels.files.written import own_files
from prodial_kernels.models.adapt.inject import merge_prodial
from prodial_kernels.models.loading.load import resolve_device, resolve_dtype
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.callbacks.base import Callback, RunView
from prodial_kernels.training.callbacks.trackers import Tracking, check_trackers
from prodial_kernels.training.callbacks.watch import Watch
from prodial_kernels.training.config import FinetuneConfig, ResolvedConfig
from prodial_kernels.training.memory.device import limited, measure
from prodial_kernels.training.memory.run_plan import comparison_text, plan_run
from prodial_kernels.training.merging import (
    Agreement,
    check_written_model,
    has_room_dense,
    logits_of,
    round_as_stored,
    write_model,
)
from prodial_kernels.training.results import FinetuneResult, best_evaluation, peak_memory
from prodial_kernels.training.run.best import BestKept
from prodial_kernels.training.run.directory import (
    RunDirectory,
    RunError,
    RunIdentity,
    check_same_config,
)
from prodial_kernels.training.run.loop import NonFiniteLossError, StepRecord, train
from prodial_kernels.training.run.metrics import MetricsLog, read_metrics
from prodial_kernels.training.run.plot import plot_loss
from prodial_kernels.training.run.preparation import Run, check_options, prepare
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.run.result_file import read_result
from prodial_kernels.training.run.signals import StopSignals
from prodial_kernels.training.run.state import (
    Position,
    StateError,
    differing_surroundings,
    load_state,
    save_state,
    saved_states,
    steps_of,
)
from prodial_kernels.training.run.versions import versions
from prodial_kernels.training.scoring.language_model import evaluate_examples
from prodial_kernels.training.scoring.log_likelihood import Scorer
from prodial_kernels.training.start.given import Given
from prodial_kernels.training.start.initial_adapter import with_settings_of_adapter
from prodial_kernels.training.step.choose import make_step
from prodial_kernels.training.step.out_of_memory import GuardedStep, OutOfMemory, out_of_memory
from prodial_kernels.upstream import require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def finetune(
    config: FinetuneConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    held_out: Any = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a model, evaluate it before and after, save it, and check what was saved.

    The directory ``config.output`` gets ``run.json`` (what this run is), ``metrics.jsonl``,
    ``loss.png``, ``results.json``, ``state/`` (to resume from), ``adapter/`` and ``merged/`` (or,
    for ``method="full"``, ``model/``), a model in transformers' format.

    Args:
        config: What to do.
        model: Train this model of transformers in the place of ``config.model``, with its
            ``tokenizer``. It is brought to ``config.device``; ``dtype="auto"`` leaves it in its
            own. Afterwards it is what was written, adapter merged, perhaps on the CPU; where
            training an adapter ends in an error, it is the pretrained model again.
        tokenizer: Use this one; needed with ``model``.
        data: Train on these rows or texts in the place of ``config.data``: a list, a
            ``datasets.Dataset``, or such by the names of splits.
        held_out: Evaluate on these in the place of ``config.held_out``.
        callbacks: Told of every event, and asked whether to end training (see
            :class:`~prodial_kernels.training.Callback`).
        resume: Continue the run in ``config.output`` from its newest saved state. Of a finished
            run the result is returned, and nothing done.
        progress: Show progress on stderr.

    Returns:
        What came out; prints as a table.

    Raises:
        MissingExtraError: transformers, tqdm, matplotlib or a tracker is not installed.
        ConfigError: An option or object that cannot be used, or both where one is needed.
        AdapterError: ``init_adapter`` is damaged, or does not belong to the model.
        TypeError: One of the callbacks is none.
        ValueError: Options of the adapter that contradict each other, or do not fit the model.
        DataError: The data cannot be used.
        ModelError: The model or the device cannot be used.
        GraphError: ``cuda_graph="on"``, and it cannot be.
        LossError: ``loss`` cannot be used on this model or machine.
        OptimizerError: ``optimizer`` cannot be used on this machine.
        PlaceError: The written model of the run was changed since, so it cannot be replaced.
        RunError: The directory holds a run already or, with ``resume``, another run or none;
            another process is running in it; or it was removed during the run.
        StateError: With ``resume``: none of the saved states is whole.
        NonFiniteLossError: Training diverged; the last saved state is kept.
        MemoryPlanError: The run does not fit into ``config.memory_budget``.
        OutOfMemory: It took more memory than there is; the state is saved.
        MergeError: The written model does not compute what was trained, and was not kept.
        Interrupted: Ctrl-C, SIGTERM or the like; the state is saved.
        OSError: The disk is full, or a file cannot be written; the last saved state is kept.
    """
    require_extra("finetune()")
    started = time.perf_counter()
    with StopSignals() as signals:
        given = Given(model, tokenizer, data, held_out)
        config = with_settings_of_adapter(config, named=model is None)
        config = given.noted_in(config).resolved()
        folder = RunDirectory(config.output)
        display = Progress(enabled=progress)
        device = resolve_device(config.device)
        dtype = given.dtype(resolve_dtype(config.dtype, device), config)
        check_trackers(config.report_to or ())
        watch = Watch([*map(Tracking, config.report_to or ()), *callbacks])
        check_options(config, device, dtype)
        # Quickly, before a directory is made; what counts is the look under the lock.
        if resume:
            folder.read_identity()
        else:
            folder.check_startable()
        with folder.only_one_process(create=not resume):
            saved = _whose_run(folder, resume, display)
            if saved is not None:
                if config.quantize == "auto":
                    # What was chosen when the run began.
                    config = _with_format(config, saved.config.get("quantize"))
                check_same_config(folder, saved, config)
                finished = read_result(folder, display.say)
                if finished is not None:
                    display.say(f"the run in {folder.path} is finished: there is nothing to do")
                    return finished
                # They are replaced at the end: rather now than then, if they cannot be.
                for path in (folder.merged, folder.full_model):
                    with suppress(FileNotFoundError):
                        own_files(path)
            display.say(f"loading model {config.model!r} and data {config.data!r}")
            choice, plan = plan_run(config, device, dtype, model)
            if config.quantize == "auto":
                config = _with_format(config, None if plan is None else plan.plan.quantize)
            with limited(device, None if plan is None else plan.allowed), _ended(watch, given):
                run = prepare(
                    config, folder, saved, display,
                    device=device, dtype=dtype, choice=choice, plan=plan, given=given,
                )  # fmt: skip
                try:
                    events = _train(run, saved, signals, watch)
                    result = _finish(run, events, started)
                finally:
                    run.levels.remove()
            watch.end(result)
            return result


@contextmanager
def _ended(watch: Watch, given: Given) -> Iterator[None]:
    """Tell callbacks of a run that ended in an error, and give the caller's model back."""
    try:
        yield
    except BaseException:
        given.give_back()
        watch.end(None)
        raise


def _with_format(config: ResolvedConfig, quantize: str | None) -> ResolvedConfig:
    """Return the configuration with the format that ``quantize="auto"`` has come to."""
    modules = "projectors" if quantize is None else config.quantize_modules
    return replace(config, quantize=quantize, quantize_modules=modules)


def _whose_run(folder: RunDirectory, resume: bool, display: Progress) -> RunIdentity | None:
    """Return the run to continue, None for a new one; call it under the lock."""
    if resume:
        saved = folder.read_identity()
    else:
        saved = None
        folder.check_startable()
        if folder.identity_file.exists():
            display.say(f"an earlier run in {folder.path} saved nothing: a new one takes its place")
    folder.remove_leftovers()
    return saved


def _restore(run: Run) -> Position:
    """Load the newest state that can be, or begin at step 0; StateError where all are damaged."""
    states, reasons = saved_states(run.folder.states), []
    for path in reversed(states):
        try:
            position = load_state(
                path, run.loaded.model, run.method.optimizer,
                run=run.identity.fingerprint, fits=run.options.reaches,
            )  # fmt: skip
        except StateError as error:
            run.display.say(f"skipping a state: {error}")
            reasons.append(str(error))
            continue
        others = differing_surroundings(path)
        if others:
            run.display.say(f"the last bits may differ from here on: {', '.join(others)}")
        run.display.say(f"resuming after step {position.step} of {run.options.steps}")
        return position
    if reasons:
        raise StateError(
            f"all {len(states)} saved states are damaged, or of another run or version; of the "
            f"newest: {reasons[0]}. Restore one from a copy, or remove {run.folder.states} to "
            "begin again at step 0"
        )
    run.display.say("no saved state yet: starting from step 0")
    return Position()


def _train(run: Run, saved: RunIdentity | None, signals: StopSignals, watch: Watch) -> RunEvents:
    folder, say = run.folder, run.display.say
    position = Position() if saved is None else _restore(run)
    step = GuardedStep(
        make_step(
            run.loaded.model, run.method.optimizer, run.config, run.choice, device=run.device,
            autocast_dtype=run.autocast_dtype, say=say,
        ),
        run.method.optimizer,
    )  # fmt: skip
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    if saved is None:
        # As late as can be: what fails before leaves nothing behind.
        folder.check_there()
        folder.write_identity(run.identity)
    log = MetricsLog(folder.metrics_file, step=position.step)
    if log.dropped:
        say(f"{folder.metrics_file}: {log.dropped} lines that are no records were dropped")
    try:
        events = RunEvents(run, log, position, watch)
        events.begin()
        _take_steps(run, step, events, signals)
        return events
    finally:
        step.close()
        log.close()


def _take_steps(run: Run, step: GuardedStep, events: RunEvents, signals: StopSignals) -> None:
    """Train; on an out-of-memory save what is whole and say what would fit."""
    try:
        with run.display.training(run.options.steps, events.position):
            train(
                run.loaded.model, step, run.batches, run.options, events,
                signals=signals, position=events.position,
            )  # fmt: skip
        return
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {_last_state(run.folder)}") from error
    except torch.OutOfMemoryError as error:
        failure = out_of_memory(error, "in an evaluation")
    except OutOfMemory as error:
        failure = error
    # Outside the handlers, so that nothing refers to what the failed step had made.
    kept = _last_state(run.folder)
    if failure.whole:
        events.save(events.position)
        kept = f"the state after step {events.position.step} is saved"
    raise failure.explained(kept, None if run.plan is None else run.plan.advice())


def _last_state(folder: RunDirectory) -> str:
    states = saved_states(folder.states)
    return f"the last good state is {states[-1]}" if states else "no state was saved before it"


class RunEvents:
    """What a run does at the loop's events: logs steps, saves states, evaluates, tells callbacks.

    Attributes:
        position: Where the run stands after its last step.
        stopped: Whether a callback has ended training.
        best: The parameters of the best evaluations; None where only the last count.
    """

    def __init__(self, run: Run, log: MetricsLog, position: Position, watch: Watch) -> None:
        """Begin at ``position``."""
        self.position = position
        self._run = run
        self._log = log
        self._watch = watch
        self._history = read_metrics(run.folder.metrics_file)
        self.stopped = any((r["kind"], r["step"]) == ("stop", position.step) for r in self._history)
        self.best: BestKept | None = None
        if run.config.keep == "best":
            self.best = BestKept(
                run.folder.best, run.loaded.model,
                run=run.identity.fingerprint, step=position.step, say=run.display.say,
            )  # fmt: skip
            self._compare_best()

    def begin(self) -> None:
        """Tell the callbacks of the run."""
        run = self._run
        began = os.stat(run.folder.identity_file).st_mtime_ns
        named = f"{run.identity.fingerprint} {began}"
        self._watch.begin(
            RunView(
                run.config, run.loaded.model, run.loaded.tokenizer, run.folder.path,
                run.options.steps, self.position.step, tuple(self._history),
                hashlib.sha256(named.encode()).hexdigest()[:16],
            )
        )  # fmt: skip

    def logged(self, record: StepRecord) -> None:
        """Write the step to ``metrics.jsonl``, where its turn is, and show it."""
        self._run.folder.check_there()
        self.position = record.position
        self._run.display.step(record)
        step = record.position.step
        if step % self._run.config.log_every == 0 or step == self._run.options.steps:
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
        self._stop(step, self._watch.step(record))

    def save(self, position: Position) -> None:
        """Save the state, after the lines of ``metrics.jsonl`` that belong to it."""
        folder = self._run.folder
        folder.check_there()
        self._log.flush()
        path = save_state(
            folder.states, position, self._run.loaded.model, self._run.method.optimizer,
            run=self._run.identity.fingerprint,
        )  # fmt: skip
        if self.best is not None:
            self.best.prune(steps_of(folder.states))
        self._watch.saved(position.step, path)

    def evaluate(self, position: Position) -> None:
        """Evaluate on the held-out examples."""
        metrics = self.metrics()
        self._log.write({"kind": "evaluation", "step": position.step, **metrics})
        is_best = self.best is not None and self.best.offer(position.step, metrics)
        headline = "bits_per_byte" if "bits_per_byte" in metrics else "acc"
        note = ", the best so far" if is_best and position.step else ""
        self._run.display.say(
            f"step {position.step}: held-out {headline} {metrics[headline]:.4f}{note}"
        )
        self._stop(position.step, self._watch.evaluated(position.step, metrics))

    def metrics(self) -> dict[str, Any]:
        """Return what an evaluation of the model as it is now gives."""
        return _evaluate(self._run)

    def _stop(self, step: int, by: Sequence[str]) -> None:
        if not by or self.stopped or step >= self._run.options.steps:
            return
        self.stopped = True
        self._log.write({"kind": "stop", "step": step})
        steps = self._run.options.steps
        self._run.display.say(f"{', '.join(by)} ends training after step {step} of {steps}")

    def _compare_best(self) -> None:
        """Say where the best evaluation of an earlier part of the run was not kept."""
        earlier = [record for record in self._history if record["kind"] == "evaluation"]
        if not earlier or self.best is None:
            return
        step = best_evaluation(earlier)["step"]
        kept = self.best.best
        if kept is None or kept.step != step:
            self._run.display.say(
                f"the parameters of the best evaluation so far, after step {step}, were not kept; "
                "what is kept is the best from here on"
            )


def _evaluate(run: Run) -> dict[str, Any]:
    autocast = run.autocast_dtype
    with (
        run.display.evaluating() as advance,
        torch.autocast(run.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        scorer = Scorer(
            run.loaded.model, run.loaded.tokenizer, seq_len=run.config.seq_len,
            batch_size=run.evaluation_batch, progress=advance,
        )  # fmt: skip
        metrics = evaluate_examples(scorer, run.split.held_out, max_tokens=run.config.eval_tokens)
    return finite_or_none(asdict(metrics))


def _finish(run: Run, events: RunEvents, started: float) -> FinetuneResult:
    """Save the adapter, write the merged model, check it, draw the curve, sum up."""
    folder, say, position = run.folder, run.display.say, events.position
    folder.check_there()
    records = read_metrics(folder.metrics_file)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    if not evaluations:
        raise RunError(
            f"{folder.metrics_file} holds no evaluation any more; continue with resume=True, "
            "which evaluates again"
        )
    peak = peak_memory(run.device)
    memory = None
    if run.plan is not None:
        memory = run.plan.compared(measure(run.device))
        say(f"peak memory: {comparison_text(memory)}")
    run.levels.remove()
    after, kept = evaluations[-1], position.step
    if events.best is not None:
        best = events.best.restore()
        after, kept = {"kind": "evaluation", "step": best.step, **best.metrics}, best.step
        say(f"what is written is step {kept} of {position.step}, the best evaluation")
    full = run.config.method == "full"
    if not full:
        # A model that was handed in may have no name to be found by.
        unnamed = run.config.model == type(run.loaded.model).__name__
        base = None if unnamed else run.config.model
        save_adapter(run.loaded.model, folder.adapter, base_model=base)
    model_dir = folder.full_model if full else folder.merged
    say(f"writing the {'trained' if full else 'merged'} model to {model_dir}")
    agreement = _write_and_check(run)
    with atomic_file(folder.plot_file) as picture:
        plot_loss(records, picture, title=run.title)
    result = FinetuneResult(
        method=run.config.method,
        rank=None if run.method.adapter is None else run.method.adapter.r,
        before=next((e for e in evaluations if e["step"] == 0), {}),
        after=after,
        trainable=run.method.report.trainable,
        total=run.method.report.total,
        steps=position.step,
        kept_step=kept,
        planned_steps=run.options.steps,
        tokens=position.tokens,
        train_seconds=position.seconds,
        seconds=time.perf_counter() - started,
        peak_bytes=peak,
        memory=memory,
        device=run.device.type,
        agreement=agreement,
        output=folder.path,
        adapter_dir=None if full else folder.adapter,
        model_dir=model_dir,
        best=best_evaluation(evaluations),
        data=run.data_record,
        versions=versions(),
        implementation=run.implementation,
    )
    atomic_text(folder.results_file, json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _write_and_check(run: Run) -> Agreement:
    model, tokens = run.loaded.model, run.batches.batch(0).input_ids[:4]
    # Also where the checkpoint itself is.
    quantised = any(isinstance(module, QuantizedLinear) for module in model.modules())
    by_blocks = quantised and not has_room_dense(model, run.device)
    if by_blocks:
        # As few as it takes to tell.
        tokens = tokens[:1, :32]
    elif run.plan is not None:
        # The logits of more may be more than there is room for.
        tokens = tokens[:1, :512]
    expected = logits_of(model, tokens)
    full = run.config.method == "full"
    path = run.folder.full_model if full else run.folder.merged
    if quantised:
        # Merged, it is dense: that is left to the host.
        model.cpu()
    rounded = None
    if not full:
        merge_prodial(model)
        rounded = round_as_stored(run.loaded, tokens, expected, dtype=run.config.dtype)
    with write_model(model, run.loaded.tokenizer, path, replace=True) as written:
        if run.plan is not None:
            # There need not be room for two.
            model.cpu()
            torch.cuda.empty_cache()
        # Fully fine-tuned weights are written in float32, as they were trained.
        dtype = torch.float32 if full else run.dtype
        return check_written_model(
            written, tokens, expected, device=run.device, dtype=dtype, by_blocks=by_blocks,
            rounded=rounded,
        )  # fmt: skip
