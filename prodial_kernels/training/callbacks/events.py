"""What a run does at the events of its loop: log, save, evaluate, tell callbacks.

Of several processes each computes; the first one writes, and decides with its callbacks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from prodial_kernels.files.json_values import finite_or_none
from prodial_kernels.training.callbacks.base import RunView
from prodial_kernels.training.callbacks.watch import Watch
from prodial_kernels.training.distributed.replicas import check_replicas
from prodial_kernels.training.results import best_evaluation
from prodial_kernels.training.run.best import BestKept
from prodial_kernels.training.run.loop import StepRecord
from prodial_kernels.training.run.metrics import MetricsLog, read_metrics
from prodial_kernels.training.run.preparation import Run
from prodial_kernels.training.run.signals import StopSignals
from prodial_kernels.training.run.state import (
    Position,
    gather_random_states,
    save_state,
    steps_of,
)
from prodial_kernels.training.scoring.language_model import evaluate_examples
from prodial_kernels.training.scoring.log_likelihood import Scorer
from prodial_kernels.training.step.eager import trained_parameters


class RunEvents:
    """What a run does at the loop's events: logs steps, saves states, evaluates, tells callbacks.

    Attributes:
        position: Where the run stands after its last step.
        stopped: Whether a callback has ended training.
        best: The parameters of the best evaluations; None where only the last count.
    """

    def __init__(
        self,
        run: Run,
        log: MetricsLog | None,
        position: Position,
        watch: Watch,
        signals: StopSignals,
    ) -> None:
        """Begin at ``position``; of several processes only the first has a log."""
        self.position = position
        self._run = run
        self._log = log
        self._watch = watch
        self._signals = signals
        self._history = run.world.from_main(lambda: read_metrics(run.folder.metrics_file))
        self._asked = run.world.from_main(lambda: watch.may_end)
        self.stopped = any((r["kind"], r["step"]) == ("stop", position.step) for r in self._history)
        self.best: BestKept | None = None
        if run.config.keep == "best" and log is not None:
            self.best = BestKept(
                run.folder.best, run.loaded.model,
                run=run.identity.fingerprint, step=position.step, say=run.display.say,
            )  # fmt: skip
            self._compare_best()

    def begin(self) -> None:
        """Tell the callbacks of the run."""
        run = self._run
        if self._log is None:
            return
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
        self.position = record.position
        step = record.position.step
        if self._log is not None:
            self._run.folder.check_there()
            self._run.display.step(record)
        due = step % self._run.config.log_every == 0 or step == self._run.options.steps
        if self._log is not None and due:
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
        self._stop(step, lambda: self._watch.step(record))

    def save(self, position: Position) -> None:
        """Save the state, after the lines of ``metrics.jsonl`` that belong to it."""
        run, folder = self._run, self._run.folder
        check_replicas(run.world, trained_parameters(run.method.optimizer))
        random = gather_random_states(run.world)
        if self._log is not None:
            folder.check_there()
            self._log.flush()
            path = save_state(
                folder.states, position, run.loaded.model, run.method.optimizer,
                run=run.identity.fingerprint, random=random,
            )  # fmt: skip
            if self.best is not None:
                self.best.prune(steps_of(folder.states))
            self._watch.saved(position.step, path)
        # Nobody goes on from what was not written.
        run.world.wait()

    def evaluate(self, position: Position) -> None:
        """Evaluate on the held-out examples."""
        metrics = self.metrics()
        if self._log is not None:
            self._log.write({"kind": "evaluation", "step": position.step, **metrics})
        is_best = self.best is not None and self.best.offer(position.step, metrics)
        headline = "bits_per_byte" if "bits_per_byte" in metrics else "acc"
        note = ", the best so far" if is_best and position.step else ""
        self._run.display.say(
            f"step {position.step}: held-out {headline} {metrics[headline]:.4f}{note}"
        )
        self._stop(position.step, lambda: self._watch.evaluated(position.step, metrics))
        if self._run.world.size > 1:
            if any(self._run.world.gather(self._signals.noted is not None)):
                self._signals.agree()
            self._signals.check()

    def metrics(self) -> dict[str, Any]:
        """Return what an evaluation of the model as it is now gives."""
        return held_out_metrics(self._run)

    def _stop(self, step: int, ask: Callable[[], Sequence[str]]) -> None:
        by: Sequence[str] = []
        if self._asked:
            by = self._run.world.from_main(ask)
        elif self._log is not None:
            by = ask()
        if not by or self.stopped or step >= self._run.options.steps:
            return
        self.stopped = True
        if self._log is not None:
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


def held_out_metrics(run: Run) -> dict[str, Any]:
    """Evaluate a run's model as it is now on its held-out examples."""
    autocast = run.autocast_dtype
    with (
        run.display.evaluating() as advance,
        torch.autocast(run.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        scorer = Scorer(
            run.loaded.model, run.loaded.tokenizer, seq_len=run.config.seq_len,
            batch_size=run.evaluation_batch, progress=advance, world=run.world,
        )  # fmt: skip
        metrics = evaluate_examples(scorer, run.split.held_out, max_tokens=run.config.eval_tokens)
    return finite_or_none(asdict(metrics))
