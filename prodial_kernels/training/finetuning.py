"""``finetune``: the whole run, from a configuration to a checked model on disk.

result = finetune(FinetuneConfig(model="path/to/mamba", data="notes.txt", steps=500))
print(result)

Objects can take the place of names: ``finetune(config, model=model, tokenizer=tokenizer,
data=rows)``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prodial_kernels.checkpoint import load_adapter, save_adapter
from prodial_kernels.files.atomic import atomic_file, atomic_text
from prodial_kernels.files.written import own_files
from prodial_kernels.models.adapt.inject import merge_prodial, remove_prodial
from prodial_kernels.models.adapt.state import inserted_into
from prodial_kernels.models.loading.load import resolve_device, resolve_dtype
from prodial_kernels.models.methods.planning import kept_methods
from prodial_kernels.models.mixers.inserted.lengths import costly_length
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.callbacks.base import Callback
from prodial_kernels.training.callbacks.events import RunEvents
from prodial_kernels.training.callbacks.trackers import Tracking, check_trackers
from prodial_kernels.training.callbacks.watch import Watch
from prodial_kernels.training.config import ConfigError, FinetuneConfig, ResolvedConfig
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.distributed.launch import Launch
from prodial_kernels.training.distributed.replicas import check_replicas
from prodial_kernels.training.distributed.world import World, joined, take_gpu
from prodial_kernels.training.memory.device import limited, measure
from prodial_kernels.training.memory.run_plan import comparison_text, plan_run
from prodial_kernels.training.merging import (
    Agreement,
    check_adapter,
    check_written_model,
    has_room_dense,
    logits_of,
    round_as_stored,
    write_model,
)
from prodial_kernels.training.results import FinetuneResult, best_evaluation, peak_memory
from prodial_kernels.training.run.directory import (
    RunDirectory,
    RunError,
    RunIdentity,
    check_same_config,
)
from prodial_kernels.training.run.loop import NonFiniteLossError, train
from prodial_kernels.training.run.metrics import MetricsLog, read_metrics
from prodial_kernels.training.run.plot import plot_loss
from prodial_kernels.training.run.preparation import Run, check_options, prepare
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.run.result_file import read_result, result_of
from prodial_kernels.training.run.signals import StopSignals
from prodial_kernels.training.run.state import (
    Position,
    StateError,
    differing_surroundings,
    load_state,
    saved_states,
)
from prodial_kernels.training.run.versions import versions
from prodial_kernels.training.sizes import size_text
from prodial_kernels.training.start.given import Given
from prodial_kernels.training.start.initial_adapter import with_settings_of_adapter
from prodial_kernels.training.step.choose import make_step
from prodial_kernels.training.step.eager import trained_parameters
from prodial_kernels.training.step.out_of_memory import GuardedStep, OutOfMemory, out_of_memory
from prodial_kernels.training.step.tuning import tune
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

    In each of several processes that ``torchrun`` or ``accelerate launch`` has started, with the
    same arguments: they share the micro-batches of every step, the first one writes, its callbacks
    are called, and all return the result.

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
        TypeError: ``config`` is none, or one of the callbacks.
        ValueError: Options of the adapter that contradict each other, or do not fit the model.
        DataError: The data cannot be used.
        ModelError: The model or the device cannot be used.
        GraphError: ``cuda_graph="on"``, and it cannot be.
        LossError: ``loss`` cannot be used on this model or machine.
        OptimizerError: ``optimizer`` cannot be used on this machine.
        PlaceError: The written model of the run was changed since, so it cannot be replaced.
        RunError: The directory holds a run already or, with ``resume``, another run or none;
            another process is running in it; or it was removed during the run.
        LaunchError: The processes of the run cannot work together as they were started.
        PeerError: Another process of the run failed.
        StateError: With ``resume``: none of the saved states is whole.
        NonFiniteLossError: Training diverged; the last saved state is kept.
        MemoryPlanError: The run does not fit into ``config.memory_budget``.
        OutOfMemory: It took more memory than there is; the state is saved.
        MergeError: The written model does not compute what was trained, and was not kept.
        Interrupted: Ctrl-C, SIGTERM or the like; the state is saved.
        OSError: The disk is full, or a file cannot be written; the last saved state is kept.
    """
    if not isinstance(config, FinetuneConfig):
        raise TypeError(
            f"config must be a FinetuneConfig, got {type(config).__name__}; "
            "FinetuneConfig.from_dict makes one of a dictionary"
        )
    require_extra("finetune()")
    started = time.perf_counter()
    launch = Launch.from_environment()
    with StopSignals(shared=launch.size > 1) as signals:
        given = Given(model, tokenizer, data, held_out)
        config = with_settings_of_adapter(config, named=model is None)
        config = given.noted_in(config).resolved(processes=launch.size)
        folder = RunDirectory(config.output)
        display = Progress(enabled=progress and launch.main)
        # A launcher that starts everything again has but one command for it.
        resume = resume or (launch.restarts > 0 and folder.identity_file.is_file())
        device = resolve_device(config.device)
        take_gpu(launch, device)
        dtype = given.dtype(resolve_dtype(config.dtype, device), config)
        check_trackers(config.report_to or ())
        watch = Watch([*map(Tracking, config.report_to or ()), *callbacks])
        if not launch.main:
            watch = Watch([])
        check_options(config, device, dtype)
        _check_shard(config, given, launch)
        with joined(launch, device) as world:
            # Quickly, before a directory is made; what counts is the look under the lock.
            if world.main:
                if resume:
                    folder.read_identity()
                else:
                    folder.check_startable()
            with folder.only_one_process(create=not resume) if world.main else nullcontext():
                saved, finished = _begun(world, folder, config, resume, display)
                if finished is not None:
                    display.say(f"the run in {folder.path} is finished: there is nothing to do")
                    return finished
                if saved is not None and config.quantize == "auto":
                    # What was chosen when the run began.
                    config = _with_format(config, saved.config.get("quantize"))
                display.say(f"loading model {config.model!r} and data {config.data!r}")
                own = replace(config, grad_accumulation=config.grad_accumulation // world.size)
                choice, plan = plan_run(own, device, dtype, model)
                if config.quantize == "auto":
                    config = _with_format(config, None if plan is None else plan.plan.quantize)
                if config.experts == "auto" and plan is not None:
                    config = replace(config, experts=plan.plan.experts)
                with limited(device, None if plan is None else plan.allowed), _ended(watch, given):
                    run = prepare(
                        config, folder, saved, display,
                        device=device, dtype=dtype, choice=choice, plan=plan, given=given,
                        world=world,
                    )  # fmt: skip
                    try:
                        events = _train(run, saved, signals, watch)
                        result = _finish_together(run, events, started)
                    finally:
                        run.levels.remove()
                watch.end(result)
                return result


def _check_shard(config: ResolvedConfig, given: Given, launch: Launch) -> None:
    """Raise ConfigError where a model cannot be divided, or there is nothing to divide it among."""
    if config.shard and launch.size == 1:
        raise ConfigError(
            "`shard` divides the frozen model among the processes of a run, and this is one by "
            "itself; start several with torchrun --nproc-per-node N"
        )
    if config.shard and given.model is not None:
        raise ConfigError(
            "`shard` divides a model that every process loads by its name, and this one is handed "
            "in; save it with save_pretrained, and give its directory as `model`"
        )


def _begun(
    world: World, folder: RunDirectory, config: ResolvedConfig, resume: bool, display: Progress
) -> tuple[RunIdentity | None, FinetuneResult | None]:
    """Return, in every process, the run to continue and its result if it is finished.

    The first process looks, under the lock, and raises where the run cannot go on.
    """

    def look() -> dict[str, Any]:
        saved = _whose_run(folder, resume, display)
        if saved is None:
            return {"saved": None, "finished": None}
        known = config
        if config.quantize == "auto":
            known = _with_format(config, saved.config.get("quantize"))
        check_same_config(folder, saved, known)
        finished = read_result(folder, display.say)
        if finished is None:
            # They are replaced at the end: rather now than then, if they cannot be.
            for path in (folder.merged, folder.full_model):
                with suppress(FileNotFoundError):
                    own_files(path)
        return {
            "saved": asdict(saved),
            "finished": None if finished is None else finished.to_dict(),
        }

    found = world.from_main(look)
    saved, finished = found["saved"], found["finished"]
    return (
        None if saved is None else RunIdentity(**saved),
        None if finished is None else result_of(finished, folder),
    )


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
    names = run.world.from_main(lambda: [path.name for path in saved_states(run.folder.states)])
    states, reasons = [run.folder.states / name for name in names], []
    for path in reversed(states):
        failure = ""
        try:
            position = load_state(
                path, run.loaded.model, run.method.optimizer,
                run=run.identity.fingerprint, fits=run.options.reaches, process=run.world.rank,
            )  # fmt: skip
        except StateError as error:
            failure = str(error)
        # The same one in every process.
        failure = next(filter(None, run.world.gather(failure)), "")
        if failure:
            run.display.say(f"skipping a state: {failure}")
            reasons.append(failure)
            run.method.optimizer.state.clear()
            continue
        others = differing_surroundings(path, processes=run.world.size)
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
    gradients = None
    if run.world.size > 1:
        trained = trained_parameters(run.method.optimizer)
        gradients = GradientSum(trained, run.world, signals)
        check_replicas(run.world, trained)
        batches = run.config.grad_accumulation
        say(f"{run.world.size} processes share the {batches} batches of a step")
    step = GuardedStep(
        make_step(
            run.loaded.model, run.method.optimizer, run.config, run.choice, device=run.device,
            autocast_dtype=run.autocast_dtype, gradients=gradients, say=say,
        ),
        run.method.optimizer,
    )  # fmt: skip
    _tune(run)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        model = run.loaded.model
        if costly := costly_length(model, run.config.seq_len, inserted_into(model)):
            say(f"{costly} (--seq-len)")
    log = None
    if run.world.main:
        if saved is None:
            # As late as can be: what fails before leaves nothing behind.
            folder.check_there()
            folder.write_identity(run.identity)
        log = MetricsLog(folder.metrics_file, step=position.step)
        if log.dropped:
            say(f"{folder.metrics_file}: {log.dropped} lines that are no records were dropped")
    try:
        events = RunEvents(run, log, position, watch, signals)
        events.begin()
        # Several processes stop together, or those that go on would wait for ever.
        with nullcontext() if run.world.size == 1 else signals.deferred():
            _take_steps(run, step, events, signals)
        return events
    finally:
        step.close()
        if log is not None:
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
    # A state is of all processes, and the others are in the middle of a step.
    if failure.whole and run.world.size == 1:
        events.save(events.position)
        kept = f"the state after step {events.position.step} is saved"
    raise failure.explained(kept, None if run.plan is None else run.plan.advice())


def _tune(run: Run) -> None:
    """Let upstream's kernels choose their configurations now, by what the plan has for it."""
    tokens = 0 if run.plan is None else run.plan.plan.tuning_tokens
    if not tokens:
        return
    run.display.say(
        "upstream's Mamba-2 kernels choose among their configurations, on a machine that is new to "
        "them for about a minute; TRITON_CACHE_AUTOTUNING=1 keeps what they choose"
    )
    autocast = run.autocast_dtype
    seconds = None
    with (
        suppress(torch.OutOfMemoryError),
        torch.autocast(run.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        seconds = tune(run.loaded.model, tokens)
    peak = size_text(torch.cuda.max_memory_allocated(run.device))
    torch.cuda.empty_cache()
    if seconds is None:
        run.display.say("there is no room for that now: they choose in the first step")
        return
    run.display.say(f"they took {seconds:.0f} s, and with the weights up to {peak}")


def _last_state(folder: RunDirectory) -> str:
    states = saved_states(folder.states)
    return f"the last good state is {states[-1]}" if states else "no state was saved before it"


def _finish_together(run: Run, events: RunEvents, started: float) -> FinetuneResult:
    """Let the first process finish, and return its result in all; a divided model is gathered."""
    if run.world.size == 1:
        return _finish(run, events, started)
    logits = None
    if run.config.shard:
        run.levels.remove()
        if events.best is not None:
            events.best.restore()
        if run.world.main:
            run.folder.check_there()
        save_adapter(run.loaded.model, run.folder.adapter, base_model=run.config.model)
        logits = logits_of(run.loaded.model, _few_tokens(run))
    done = run.world.from_main(lambda: _finish(run, events, started, logits).to_dict())
    return result_of(done, run.folder)


def _finish(
    run: Run, events: RunEvents, started: float, gathered: Tensor | None = None
) -> FinetuneResult:
    """Save the adapter, write the merged model, check it, draw the curve, sum up.

    ``gathered`` are logits of a model that is divided, whose adapter is saved already.
    """
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
    if not full and gathered is None:
        # A model that was handed in may have no name to be found by.
        unnamed = run.config.model == type(run.loaded.model).__name__
        base = None if unnamed else run.config.model
        save_adapter(run.loaded.model, folder.adapter, base_model=base)
    unmerged = kept_methods([] if full else run.config.adapter(r=1).methods)
    model_dir: Path | None = None
    if unmerged:
        say(f"{', '.join(unmerged)} cannot be merged into a plain model: only the adapter is kept")
        agreement = _check_adapter(run)
    else:
        model_dir = folder.full_model if full else folder.merged
        say(f"writing the {'trained' if full else 'merged'} model to {model_dir}")
        agreement = _write_and_check(run) if gathered is None else _merge_anew(run, gathered)
    with atomic_file(folder.plot_file) as picture:
        plot_loss(records, picture, title=run.title)
    result = FinetuneResult(
        method=run.config.method,
        rank=None
        if run.method.adapter is None or run.config.methods is not None
        else run.method.adapter.r,
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
        processes=run.world.size,
        methods=run.config.methods,
    )
    atomic_text(folder.results_file, json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _few_tokens(run: Run) -> Tensor:
    # The logits of more may be more than there is room for.
    return run.batches.batch(0).input_ids[:1, :512]


def _merge_anew(run: Run, expected: Tensor) -> Agreement:
    """Merge the saved adapter into its base on the CPU, where the model is divided on the GPUs."""
    loaded = Given().load(run.config, device=torch.device("cpu"), dtype=run.dtype)
    load_adapter(loaded.model, run.folder.adapter)
    merge_prodial(loaded.model)
    tokens = _few_tokens(run)
    rounded = round_as_stored(loaded, tokens, expected, dtype=run.config.dtype)
    with write_model(loaded.model, run.loaded.tokenizer, run.folder.merged, replace=True) as path:
        return check_written_model(
            path, tokens, expected, device=run.device, dtype=run.dtype,
            by_blocks=run.device.type == "cuda", rounded=rounded,
        )  # fmt: skip


def _check_adapter(run: Run) -> Agreement:
    """Put the written adapter into the model in the place of the trained one, and compare."""
    model, tokens = run.loaded.model, _few_tokens(run)
    expected = logits_of(model, tokens)
    remove_prodial(model)
    load_adapter(model, run.folder.adapter)
    return check_adapter(logits_of(model, tokens), expected, dtype=run.dtype)


def _write_and_check(run: Run) -> Agreement:
    model, tokens = run.loaded.model, run.batches.batch(0).input_ids[:4]
    # Also where the checkpoint itself is.
    quantised = any(isinstance(module, QuantizedLinear) for module in model.modules())
    by_blocks = quantised and not has_room_dense(model, run.device)
    if by_blocks:
        # As few as it takes to tell.
        tokens = tokens[:1, :32]
    elif run.plan is not None:
        tokens = _few_tokens(run)
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
