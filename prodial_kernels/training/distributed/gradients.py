"""The gradients of all processes, summed once a step: one all-reduce of one flat tensor.

Adapters are small, so one message with all of their gradients costs less than hooks that send them
while backward runs, and it lies outside whatever CUDA graph the backward pass is in. The same
message carries the loss and whether a process was asked to stop, so that all stop after the same
step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from prodial_kernels.training.distributed.launch import LaunchError
from prodial_kernels.training.distributed.world import PeerError, World

Part = TypeVar("Part")
MOST_IN_A_MESSAGE = 2**26
"""Elements of a message; full fine-tuning of a large model sends several."""
# torchrun kills a process 30 s after it has asked it to end.
_SECONDS_AFTER_A_SIGNAL = 10.0


class SharedSignals(Protocol):
    """What a run asks of its signals, and tells them.

    Attributes:
        noted: The signal that this process has received; None for none.
    """

    noted: int | None

    def agree(self) -> None:
        """Stop after this step: this process or another one was asked to."""


class GradientSum:
    """Sums the gradients of a step over all processes."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], world: World, signals: SharedSignals
    ) -> None:
        """Sum the gradients of ``parameters``, the same ones in this order in every process."""
        self._parameters = list(parameters)
        self._world = world
        self._signals = signals
        self._tail: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def share(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return the micro-batches of a step that are this process's: equally many, in a row.

        Raises:
            LaunchError: They cannot be divided equally.
        """
        size = self._world.size
        if len(parts) % size:
            raise LaunchError(f"{len(parts)} micro-batches cannot be divided among {size}")
        each = len(parts) // size
        return parts[self._world.rank * each : (self._world.rank + 1) * each]

    @torch.no_grad()
    def sum(self, loss: Tensor) -> Tensor:
        """Replace every ``grad`` by its sum over the processes; return the sum of ``loss``, 0-dim.

        In fp32 (fp64 for fp64), and the same bits in every process. Where only other processes
        have a gradient, this one gets it; what no process has becomes None in :meth:`finish`. On a
        GPU nothing waits.

        Raises:
            PeerError: Another process failed.
        """
        present = [float(parameter.grad is not None) for parameter in self._parameters]
        flags = torch.tensor([float(self._signals.noted is not None), *present])
        if loss.is_cuda:
            flags = flags.pin_memory().to(loss.device, non_blocking=True)
        buckets = [*self._buckets()]
        for number, bucket in enumerate(buckets):
            dtype = torch.promote_types(bucket[0].dtype, torch.float32)
            pieces = [_flat_gradient(parameter, dtype) for parameter in bucket]
            if number == len(buckets) - 1:
                pieces += [loss.detach().reshape(1).to(dtype), flags.to(dtype)]
            flat = torch.cat(pieces)
            self._all_reduce(flat)
            summed = flat.split([piece.numel() for piece in pieces])
            for parameter, piece in zip(bucket, summed, strict=False):
                parameter.grad = piece.view(parameter.shape).to(parameter.dtype)
        self._tail = flat[-1 - len(flags) :]
        if flat.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        return self._tail[0].to(loss.dtype)

    def finish(self) -> None:
        """Wait for the sum, take away gradients that no process had, agree on whether to stop.

        Raises:
            PeerError: Another process failed.
        """
        if self._tail is None:
            raise RuntimeError("finish() without sum()")
        if self._event is not None:
            self._world.poll(partial(self._arrived, self._event, time.monotonic()))
        _, stop, *holders = self._tail.tolist()
        self._tail = self._event = None
        for parameter, count in zip(self._parameters, holders, strict=True):
            if not count:
                parameter.grad = None
        if stop:
            self._signals.agree()

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        """Parameters of one dtype whose gradients make one message."""
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in self._parameters:
            full = size + parameter.numel() > MOST_IN_A_MESSAGE
            if bucket and (full or parameter.dtype != bucket[0].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket

    def _all_reduce(self, flat: Tensor) -> None:
        work = distributed.all_reduce(flat, async_op=True)
        if flat.is_cuda:
            # It is the stream that waits.
            work.wait()
        else:
            self._world.wait_for(work)

    def _arrived(self, event: torch.cuda.Event, began: float) -> bool:
        """Whether the device has come to an event; PeerError when it never may."""
        if event.query():
            return True
        waited = time.monotonic() - began
        if self._signals.noted is not None and waited > _SECONDS_AFTER_A_SIGNAL:
            raise PeerError("another process of the run no longer answers")
        return False


def _flat_gradient(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    return parameter.grad.reshape(-1).to(dtype)
