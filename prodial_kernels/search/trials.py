"""The runs of a search in one process: model and data are loaded once, the model restored."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prodial_kernels.checkpoint import model_fingerprint
from prodial_kernels.files.json_values import finite_or_none
from prodial_kernels.models.loading.load import LoadedModel, resolve_device, resolve_dtype
from prodial_kernels.training.callbacks.events import held_out_metrics
from prodial_kernels.training.config import FinetuneConfig, ResolvedConfig
from prodial_kernels.training.memory.device import limited
from prodial_kernels.training.memory.run_plan import plan_run
from prodial_kernels.training.method import trained_on_meta
from prodial_kernels.training.run.directory import RunDirectory
from prodial_kernels.training.run.loop import StepRecord, train
from prodial_kernels.training.run.preparation import (
    Run,
    RunData,
    batches_of,
    check_options,
    prepare,
    read_split,
)
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.run.signals import StopSignals
from prodial_kernels.training.run.state import Position
from prodial_kernels.training.scoring.language_model import evaluate_examples
from prodial_kernels.training.scoring.log_likelihood import Scorer
from prodial_kernels.training.start.given import Given
from prodial_kernels.training.step.choose import make_step
from prodial_kernels.training.step.out_of_memory import GuardedStep


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        metrics: Of its last evaluation.
        step: After how many steps that was.
        seconds: Wall time of its training steps.
        ended: Whether it was ended before its last step.
    """

    metrics: Mapping[str, Any]
    step: int
    seconds: float
    ended: bool


def objective(metrics: Mapping[str, Any]) -> float:
    """Return what a search makes small: bits per byte, or the share of wrong answers.

    Infinity for what is not a number.
    """
    bits = metrics.get("bits_per_byte")
    if bits is None and metrics.get("acc") is not None:
        return 1.0 - float(metrics["acc"])
    return float("inf") if bits is None else float(bits)


class Trials:
    """Runs trials one after the other on one model.

    Attributes:
        before: Held-out metrics of the pretrained model.
    """

    def __init__(
        self, base: FinetuneConfig, path: Path, display: Progress, signals: StopSignals
    ) -> None:
        """Load model and data, and evaluate the pretrained model.

        Args:
            base: What all trials have in common.
            path: The search's directory; nothing is written there.
            display: Where notes go.
            signals: Ends a trial after its step.

        Raises:
            Exception: What :func:`~prodial_kernels.training.finetune` raises for the same
                options, model or data.
        """
        config = base.resolved()
        self._device = resolve_device(config.device)
        self._dtype = resolve_dtype(config.dtype, self._device)
        check_options(config, self._device, self._dtype)
        self._folder = RunDirectory(path)
        self._display = display
        self._signals = signals
        self._config = config
        display.say(f"loading model {config.model!r} and data {config.data!r}")
        split = read_split(config, Given(), display)
        self._loaded = self._load()
        self._fingerprint = model_fingerprint(self._loaded.model)
        self._data = RunData(split, batches_of(config, split, self._loaded, display))
        self.before = self._evaluate_pretrained()

    def trainable(self, config: FinetuneConfig) -> int:
        """Return how many parameters a run trains.

        Raises:
            ValueError: Its methods do not fit the model.
        """
        model = trained_on_meta(self._on_loaded(config), self._dtype, self._loaded.model)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def run(
        self, config: FinetuneConfig, ends: Callable[[int, Mapping[str, Any]], bool]
    ) -> Outcome:
        """Train and evaluate; the model is the pretrained one again afterwards.

        Args:
            config: The run.
            ends: Asked after each evaluation but the last whether to end the trial there.

        Raises:
            Interrupted: A signal arrived.
            Exception: What :func:`~prodial_kernels.training.finetune` raises.
        """
        resolved = self._on_loaded(config)
        choice, plan = plan_run(resolved, self._device, self._dtype, self._loaded.model)
        given = Given(model=self._loaded.model, tokenizer=self._loaded.tokenizer)
        try:
            with limited(self._device, None if plan is None else plan.allowed):
                run = prepare(
                    resolved, self._folder, None, Progress(enabled=False),
                    device=self._device, dtype=self._dtype, choice=choice, plan=plan, given=given,
                    data=self._data,
                )  # fmt: skip
                try:
                    return self._train(run, ends)
                finally:
                    run.levels.remove()
        finally:
            given.give_back()
            self._loaded.model.zero_grad(set_to_none=True)
            if self._device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            self._check_restored()

    def _train(self, run: Run, ends: Callable[[int, Mapping[str, Any]], bool]) -> Outcome:
        step = GuardedStep(
            make_step(
                run.loaded.model, run.method.optimizer, run.config, run.choice, device=run.device,
                autocast_dtype=run.autocast_dtype, gradients=None, say=run.display.say,
            ),
            run.method.optimizer,
        )  # fmt: skip
        events = _TrialEvents(run, ends)
        try:
            position = train(
                run.loaded.model, step, run.batches, run.options, events, signals=self._signals
            )
        finally:
            step.close()
        return Outcome(events.metrics, position.step, position.seconds, events.stopped)

    def _load(self) -> LoadedModel:
        return Given().load(self._config, device=self._device, dtype=self._dtype)

    def _on_loaded(self, config: FinetuneConfig) -> ResolvedConfig:
        # The model that is at hand is quantised already.
        plain = replace(config, quantize=None, quantize_modules="projectors", experts="auto")
        return plain.resolved()

    def _check_restored(self) -> None:
        """Load the model anew if a trial has left anything else than the pretrained one."""
        model = self._loaded.model
        with suppress(ValueError):
            if model_fingerprint(model) == self._fingerprint:
                return
        self._display.say("the trial has changed the pretrained model: it is loaded anew")
        self._loaded = self._load()

    def _evaluate_pretrained(self) -> dict[str, Any]:
        config = self._config
        with self._display.evaluating() as advance:
            scorer = Scorer(
                self._loaded.model, self._loaded.tokenizer, seq_len=config.seq_len,
                batch_size=config.batch_size, progress=advance,
            )  # fmt: skip
            held_out = self._data.split.held_out
            metrics = evaluate_examples(scorer, held_out, max_tokens=config.eval_tokens)
        return finite_or_none(asdict(metrics))


class _TrialEvents:
    """What a trial does at the loop's events: evaluate, and end where there is no hope."""

    def __init__(self, run: Run, ends: Callable[[int, Mapping[str, Any]], bool]) -> None:
        self.stopped = False
        self.metrics: Mapping[str, Any] = {}
        self._run = run
        self._ends = ends
        self._started = time.perf_counter()

    def logged(self, record: StepRecord) -> None:
        """Nothing is written down of single steps."""

    def save(self, position: Position) -> None:
        """A trial that is interrupted begins again."""

    def evaluate(self, position: Position) -> None:
        """Evaluate, but for the pretrained model, whose metrics are known."""
        if position.step == 0 or self.stopped:
            return
        self.metrics = held_out_metrics(self._run)
        last = position.step >= self._run.options.steps
        self.stopped = not last and self._ends(position.step, self.metrics)
