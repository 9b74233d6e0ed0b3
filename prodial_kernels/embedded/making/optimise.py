"""The pretraining loop: random windows of a token stream, AdamW, a schedule that follows the clock.

On a GPU the whole step (forward, loss, backward, clipping, update) is one CUDA graph, because a
model this narrow is limited by launches otherwise.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from prodial_kernels.training.step.graphed import CudaGraphs
from prodial_kernels.training.step.optimizers import set_learning_rate

__all__ = ["Progress", "TrainOptions", "train"]

_SYNC_EVERY = 10  # steps the host may run ahead of the GPU, so that the clock stays honest


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        max_seconds: Wall time of the loop, warm-up steps and compilation included.
        max_steps: Most optimiser steps; the learning rate reaches 0 at whichever limit comes first.
        batch_size: Windows a step.
        sequence_length: Tokens a window.
        learning_rate: Peak of AdamW's learning rate; it falls linearly from there to 0.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled decay of matrices; vectors are not decayed.
        clip: Largest gradient norm.
        seed: Which windows are drawn.
        cuda_graph: Capture the step as a CUDA graph, on a GPU.
        log_every: Steps between log lines.
        checkpoint_seconds: Time between checkpoints.
    """

    max_seconds: float
    max_steps: int = 10**9
    batch_size: int = 128
    sequence_length: int = 512
    learning_rate: float = 5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    cuda_graph: bool = True
    log_every: int = 100
    checkpoint_seconds: float = 100.0

    def __post_init__(self) -> None:
        for name in ("max_seconds", "max_steps", "batch_size", "sequence_length", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")


@dataclass
class Progress:
    """What a run did: optimiser steps, tokens seen, seconds, and ``(step, loss)`` in nats."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    restarts: int = 0


def _optimizer(model: Any, options: TrainOptions, device: torch.device) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.dim() > 1],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    on_gpu = device.type == "cuda"
    # A CUDA graph reads the learning rate from device memory.
    rate = torch.tensor(0.0, device=device) if on_gpu else 0.0
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu)


class _Stepper:
    """Runs optimiser steps on windows drawn from the token stream."""

    def __init__(self, model: Any, tokens: torch.Tensor, options: TrainOptions) -> None:
        self._model, self._tokens, self._options = model, tokens, options
        self.device = tokens.device
        self.optimizer = _optimizer(model, options, self.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._generator = torch.Generator(self.device).manual_seed(options.seed)
        self._offsets = torch.arange(options.sequence_length + 1, device=self.device)
        shape = (options.batch_size, options.sequence_length)
        self._x = torch.zeros(shape, dtype=torch.long, device=self.device)
        self._y = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self._graphs = CudaGraphs(self.device) if self.device.type == "cuda" else None
        self._replay: Callable[[], None] | None = None

    def _draw(self) -> None:
        starts = torch.randint(
            self._tokens.numel() - self._options.sequence_length,
            (self._options.batch_size, 1),
            device=self.device,
            generator=self._generator,
        )
        window = self._tokens[starts + self._offsets].long()
        self._x.copy_(window[:, :-1])
        self._y.copy_(window[:, 1:])

    def _update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        on_gpu = self.device.type == "cuda"
        # The cast weights must be made anew in every replay, hence no cache.
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            logits = self._model(input_ids=self._x, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), self._y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._options.clip, foreach=True)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def capture(self) -> None:
        """Record the step as a CUDA graph; the steps before have compiled every kernel.

        Raises:
            RuntimeError: Something in the step cannot be captured, or there is no GPU.
        """
        if self._graphs is None:
            raise RuntimeError("CUDA graphs need a GPU")
        self._replay = self._graphs.capture(self._update)

    def step(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        self._draw()
        if self._replay is not None:
            self._replay()
        elif self._graphs is not None:
            self._graphs.run(self._update)
        else:
            self._update()


class _Guard:
    """Keeps the last good weights; after a divergence goes back to them at half the rate."""

    def __init__(self, stepper: _Stepper, model: Any) -> None:
        self._stepper, self._parameters = stepper, list(model.parameters())
        self.rate_scale = 1.0
        self.restarts = 0
        self._copies = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def check(self, loss: float, keep: bool) -> None:
        if math.isfinite(loss):
            if keep:
                for copy, p in zip(self._copies, self._parameters, strict=True):
                    copy.copy_(p)
            return
        self.restarts += 1
        self.rate_scale *= 0.5
        for copy, p in zip(self._copies, self._parameters, strict=True):
            p.copy_(copy)
        for state in self._stepper.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()


def _rates(options: TrainOptions, start: float) -> Iterator[tuple[int, float]]:
    """Yield ``(step, learning rate)`` until the time or the steps are used up."""
    step = 0
    while True:
        done = max((time.monotonic() - start) / options.max_seconds, step / options.max_steps)
        if done >= 1.0:
            return
        warm = min(1.0, (step + 1) / options.warmup_steps)
        yield step, options.learning_rate * warm * (1.0 - done)
        step += 1


def train(
    model: Any,
    tokens: torch.Tensor,
    options: TrainOptions,
    checkpoint: Callable[[], None] = lambda: None,
) -> Progress:
    """Train a causal language model in place.

    Args:
        model: A transformers causal language model with float32 parameters, in training mode, on
            the device of ``tokens``. On a GPU it runs under bfloat16 autocast.
        tokens: The training stream, integer ids ``[tokens]``.
        options: Limits and hyperparameters.
        checkpoint: Called every ``checkpoint_seconds`` with the weights up to date.

    Returns:
        Steps, tokens, seconds and the loss every ``log_every`` steps; each is also printed as one
        JSON line.

    Raises:
        ValueError: ``tokens`` is shorter than one window.
    """
    if tokens.numel() <= options.sequence_length:
        raise ValueError(
            f"tokens: expected more than sequence_length = {options.sequence_length} tokens, got "
            f"{tokens.numel()}"
        )
    stepper = _Stepper(model, tokens, options)
    guard = _Guard(stepper, model)
    progress = Progress()
    start = last_checkpoint = time.monotonic()
    tokens_a_step = options.batch_size * options.sequence_length
    graph_wanted = options.cuda_graph and tokens.device.type == "cuda"
    for step, rate in _rates(options, start):
        stepper.step(rate * guard.rate_scale)
        if step == 2 and graph_wanted:
            try:
                stepper.capture()
                print(json.dumps({"cuda_graph": True}), flush=True)
            except RuntimeError as error:  # slower, but the same computation
                print(json.dumps({"cuda_graph": False, "why": str(error)[:500]}), flush=True)
        if step < 3 or step % _SYNC_EVERY == 0:
            loss = stepper.loss.item()
            guard.check(loss, keep=step % (10 * options.log_every) == 0)
        now = time.monotonic()
        progress.steps = step + 1
        progress.tokens = progress.steps * tokens_a_step
        progress.seconds = now - start
        progress.restarts = guard.restarts
        if step % options.log_every == 0:
            loss = stepper.loss.item()
            progress.losses.append((step, loss))
            line = {
                "step": step,
                "loss": round(loss, 4),
                "rate": round(rate * guard.rate_scale, 6),
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 1),
            }
            print(json.dumps(line), flush=True)
        if now - last_checkpoint > options.checkpoint_seconds:
            checkpoint()
            last_checkpoint = time.monotonic()
    return progress
