"""The whole optimiser step as one CUDA graph.

A step of a small model is thousands of short kernels, and launching them takes the host longer
than running them takes the GPU: at 4 × 512 tokens the GPU is idle most of an eager step. Captured
once, a step is one launch. What is captured: forward, loss and backward of every micro-batch,
clipping, the optimiser's update, all on tensors that stay where they are. Inputs, learning rate and
the weight of a label are written into such tensors before every launch.

* A shape's first steps run eagerly, as real steps, so that kernels are compiled and moments exist;
  the last of them is watched for operations that wait for the device, which no graph can hold.
* Sequences are padded to one of a few lengths, batches to their full size, so that few shapes are
  captured.
* A step whose loss or gradient is not finite is left out on the device (``found_inf`` of the fused
  AdamW), so that the host need not look before the update.
* Dropout draws from the device's generator, which replays advance as eager steps do; a saved state
  therefore continues alike.
* Optimisers that cannot be captured run eagerly behind the graph. So do the sum of the gradients
  of several processes, clipping and the update after it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from prodial_kernels._checks import check_choice
from prodial_kernels.kernels.replay.streams import watched_for_waits
from prodial_kernels.training.config import CUDA_GRAPHS
from prodial_kernels.training.data.batches import IGNORED, Batch
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.step.eager import (
    EagerStep,
    StepResult,
    label_weight,
    trained_parameters,
)
from prodial_kernels.training.step.loss import Loss
from prodial_kernels.training.step.optimizers import (
    is_capturable,
    make_capturable,
    set_learning_rate,
)

WARM_UP = 2
"""Eager steps before the first capture: one that compiles, one that is watched."""

MOST_TOKENS = 8192
"""Tokens of a micro-batch up to which ``"auto"`` uses graphs; above, the GPU is the one to wait
for."""

MOST_PARTS = 16
"""Micro-batches of a step up to which ``"auto"`` uses graphs, which hold every one's kernels."""

MAX_BUCKETS = 8
"""Lengths in all, each a graph of its own; the shortest is a tenth of the longest."""

_MULTIPLE = 8
Function: TypeAlias = Callable[[], None]


class GraphError(RuntimeError):
    """Steps cannot be captured in a CUDA graph."""


def choose_graph(
    mode: str,
    *,
    device: torch.device,
    tokens: int,
    parts: int = 1,
    obstacles: Sequence[str] = (),
) -> tuple[bool, str]:
    """Decide whether to capture steps.

    Args:
        mode: ``"auto"``, ``"on"`` or ``"off"``.
        device: Where the model is.
        tokens: Tokens of a micro-batch.
        parts: Micro-batches of a step.
        obstacles: What of this run no graph can hold, such as ``"loss 'liger'"``.

    Raises:
        GraphError: ``"on"``, and it cannot be.
        ValueError: An unknown mode.
    """
    check_choice("mode", mode, CUDA_GRAPHS)
    if mode == "off":
        return False, "as asked for"
    missing = list(obstacles)
    if device.type != "cuda":
        missing.insert(0, f"the model is on {device.type!r}, not on a CUDA device")
    if missing and mode == "on":
        raise GraphError(f"cuda_graph 'on' cannot be: {'; '.join(missing)}. Use 'auto' or 'off'")
    if missing:
        return False, "; ".join(missing)
    if mode == "on":
        return True, "as asked for"
    if tokens > MOST_TOKENS:
        reason = f"{tokens:,} tokens keep the GPU busy by themselves"
        return False, f"{reason} (more than {MOST_TOKENS:,})"
    if parts > MOST_PARTS:
        return False, f"{parts} micro-batches in a step (more than {MOST_PARTS})"
    return True, "launching a step would take longer than running it"


class Shape(NamedTuple):
    """Micro-batches, sequences in one, tokens in a sequence."""

    parts: int
    batch: int
    length: int


class Buckets:
    """The shapes that steps of one run are given.

    Lengths fall by √2, so that padding adds a sixth on average. Padding is on the right and has no
    label, so that it reaches no token before it and nothing is learned from it; missing sequences
    of an epoch's last batch are padding likewise.
    """

    def __init__(self, batch_size: int, seq_len: int) -> None:
        """Make the buckets of batches of at most ``[batch_size, seq_len]``."""
        self.batch_size = batch_size
        lengths = {_rounded(seq_len * 2 ** (-k / 2)) for k in range(MAX_BUCKETS)}
        # Batches of windows have this very length.
        self.lengths = sorted({seq_len, *(n for n in lengths if n < seq_len), _rounded(seq_len)})

    def shape_of(self, parts: Sequence[Batch]) -> Shape:
        """Return the smallest shape that holds every micro-batch of a step, or raise ValueError."""
        longest = max(part.input_ids.shape[1] for part in parts)
        widest = max(part.input_ids.shape[0] for part in parts)
        fitting = [length for length in self.lengths if length >= longest]
        if not fitting or widest > self.batch_size:
            raise ValueError(
                f"batches must be at most [{self.batch_size}, {self.lengths[-1]}], got one of "
                f"[{widest}, {longest}]"
            )
        return Shape(len(parts), self.batch_size, fitting[0])


def fill(parts: Sequence[Batch], held: Batch) -> None:
    """Write micro-batches into tensors ``[parts, batch, length]`` that may be larger."""
    for target, name in zip(held, Batch._fields, strict=True):
        if target is None:
            continue
        target.fill_(IGNORED if name == "labels" else 0)
        for place, part in enumerate(parts):
            source = getattr(part, name)
            target[place, : source.shape[0], : source.shape[1]] = source


def buffers(shape: Shape, like: Batch, device: torch.device | str) -> Batch:
    """Return what :func:`fill` writes to; on the CPU in pinned memory where there is CUDA."""
    pinned = torch.device(device).type == "cpu" and torch.cuda.is_available()

    def make(tensor: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=tensor.dtype, device=device, pin_memory=pinned)

    apart = {name: make(tensor) for name, tensor in like.apart.items()}
    return Batch(make(like.input_ids), make(like.labels), **apart)


def _rounded(length: float) -> int:
    return max(_MULTIPLE, math.ceil(length / _MULTIPLE) * _MULTIPLE)


class CudaGraphs:
    """Runs a function on a stream of its own, and captures it there.

    Graphs share a memory pool: they never run at the same time, and no graph reads what another one
    left there.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def run(self, function: Function) -> None:
        """Run a function as it is, on the stream that captures."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def run_watched(self, function: Function) -> list[str]:
        """Run a function and return where it waits for the device, which no graph can do."""
        _, places = watched_for_waits(lambda: self.run(function))
        return places

    def capture(self, function: Function) -> Function:
        """Capture a function, without running it, and return what runs it."""
        # What a step left behind would stay beside the graph's own memory.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # NCCL's watchdog calls CUDA in a thread of its own.
        mode = "thread_local" if torch.distributed.is_initialized() else "global"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            function()
        return graph.replay

    def release(self) -> None:
        """Give back the memory of graphs that nothing refers to any more."""
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class _Program:
    """A step of one shape: its inputs on host and device, and what runs it."""

    host: Batch
    device: Batch
    warm: int = 0
    replay: Callable[[], None] | None = None
    gradients: tuple[Tensor | None, ...] = ()


class GraphedStep:
    """A step launched as one CUDA graph; see the module's docstring."""

    def __init__(
        self,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        buckets: Buckets,
        graphs: CudaGraphs,
        *,
        clip: float = 0.0,
        autocast_dtype: torch.dtype | None = None,
        required: bool = False,
        gradients: GradientSum | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Train the optimiser's parameters on ``loss``.

        Args:
            loss: Of a micro-batch; must not wait for the device.
            optimizer: Its learning rate becomes a tensor if its step can be captured.
            buckets: The shapes to capture.
            graphs: What captures.
            clip: Largest gradient norm; 0 for no clipping.
            autocast_dtype: Run forward under autocast to this dtype.
            required: Raise where a step turns out not to be capturable; else go on eagerly.
            gradients: Sums over the processes of the run; None where there is one.
            say: Told when that happens.
        """
        self._eager = EagerStep(
            loss, optimizer, clip=clip, autocast_dtype=autocast_dtype, gradients=gradients
        )
        self._gradients = gradients
        self._falls_back = False
        self._optimizer = optimizer
        self._trained = trained_parameters(optimizer)
        self._buckets = buckets
        self._graphs = graphs
        self._required = required
        self._say = say
        self._programs: dict[Shape, _Program] = {}
        self._running: _Program | None = None
        self._watched = False
        device = self._trained[0].device
        self._weight = torch.zeros((), device=device)
        self._skip = torch.zeros((), device=device)
        self._loss = torch.zeros((), device=device)
        self._result = torch.zeros(2, device=device)
        # What depends on other processes is left out of the graph, and what follows it.
        self._whole = is_capturable(optimizer) and gradients is None
        if self._whole:
            make_capturable(optimizer)

    @property
    def captures(self) -> bool:
        """Whether steps are captured; not after one has turned out to wait for the device."""
        return not self._falls_back

    def begin(self, parts: Sequence[Batch], lr: float) -> None:
        """See :class:`TrainingStep`.

        Raises:
            GraphError: The step waits for the device, and this was ``required``; or capturing it
                failed. No step is half taken.
        """
        if self._falls_back:
            self._eager.begin(parts, lr)
            return
        own = parts if self._gradients is None else self._gradients.share(parts)
        program = self._program(self._buckets.shape_of(own), own[0])
        fill(own, program.host)
        for host, device in zip(program.host, program.device, strict=True):
            if host is not None and device is not None:
                device.copy_(host, non_blocking=True)
        self._weight.fill_(label_weight(parts))
        set_learning_rate(self._optimizer, lr)
        self._running = program
        if program.replay is None:
            if program.warm < (1 if self._watched else WARM_UP):
                self._warm_up(program)
                self._combine()
                return
            program.replay = self._captured(program)
            if not self._whole:
                program.gradients = tuple(parameter.grad for parameter in self._trained)
        program.replay()
        # An eager optimiser is to find what this replay has written.
        for parameter, gradient in zip(self._trained, program.gradients, strict=False):
            parameter.grad = gradient
        self._combine()

    def finish(self) -> StepResult:
        """See :class:`TrainingStep`."""
        if self._falls_back and self._running is None:
            return self._eager.finish()
        if self._running is None:
            raise RuntimeError("finish() without begin()")
        self._running = None
        result = self._eager.result(self._result)
        if not self._whole:
            if result.finite:
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return result

    def close(self) -> None:
        """See :class:`TrainingStep`."""
        self._programs.clear()
        self._running = None
        self._optimizer.zero_grad(set_to_none=True)
        self._graphs.release()

    def _combine(self) -> None:
        """Go on with what the other processes have computed too."""
        if self._gradients is not None:
            self._result.copy_(self._eager.combine(self._loss))

    def _program(self, shape: Shape, like: Batch) -> _Program:
        program = self._programs.get(shape)
        if program is None:
            device = self._trained[0].device
            program = _Program(buffers(shape, like, "cpu"), buffers(shape, like, device))
            # Its eager step would need as much memory again as the graphs hold.
            for other in self._programs.values():
                other.replay, other.gradients = None, ()
            if self._programs:
                self._graphs.release()
            self._programs[shape] = program
        return program

    def _warm_up(self, program: _Program) -> None:
        """Take a real step eagerly; the last one before the first capture is watched."""
        program.warm += 1
        if self._watched or program.warm < WARM_UP:
            self._graphs.run(lambda: self._compute(program))
            return
        waits = self._graphs.run_watched(lambda: self._compute(program))
        self._watched = True
        if not waits:
            return
        places = ", ".join(waits[:3])
        reason = f"the step waits for the device in {places}"
        if self._required:
            raise GraphError(f"cuda_graph 'on' cannot be: {reason}. Use 'auto' or 'off'")
        self._say(f"no CUDA graph: {reason}")
        self._programs.clear()
        self._falls_back = True

    def _captured(self, program: _Program) -> Callable[[], None]:
        try:
            return self._graphs.capture(lambda: self._compute(program))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or ["no message"])[0]
            raise GraphError(
                f"the step cannot be captured in a CUDA graph ({first}); use cuda_graph 'off'"
            ) from error

    def _compute(self, program: _Program) -> None:
        """The step on a program's tensors; the same operations in every run."""
        self._optimizer.zero_grad(set_to_none=True)
        held = program.device
        parts = [
            Batch(ids, labels, **{name: tensor[i] for name, tensor in held.apart.items()})
            for i, (ids, labels) in enumerate(zip(held.input_ids, held.labels, strict=True))
        ]
        loss = self._eager.accumulate(parts, self._weight, every_position=True)
        if self._gradients is not None:
            self._loss.copy_(loss)
            return
        result = self._eager.combine(loss)
        self._result.copy_(result)
        if not self._whole:
            return
        self._skip.copy_(~result.isfinite().all())
        optimizer = self._optimizer
        # As torch.amp.GradScaler does.
        optimizer.found_inf = self._skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
