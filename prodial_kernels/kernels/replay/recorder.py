"""Launching kernels, and writing down what was launched while someone records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prodial_kernels.kernels.replay.raw_launch import RawLaunch, UnsupportedLaunch, is_descriptor
from prodial_kernels.kernels.replay.recording import FORK, JOIN, MAIN, SIDE, Output, Recording
from prodial_kernels.kernels.replay.streams import SideStream, side_stream
from prodial_kernels.kernels.replay.workspace import Lifetime, pack

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)  # fmt: skip

Function = Callable[..., Sequence[Tensor | None]]

Result = TypeVar("Result")

_recording = threading.local()


def recorder() -> Recorder | None:
    """Return the recorder that this thread runs under."""
    active: Recorder | None = getattr(_recording, "active", None)
    return active


def launch(
    kernel: Any, grid: tuple[int, ...], *, side: SideStream | None = None, **arguments: Any
) -> None:
    """``kernel[grid](**arguments)``, on a side stream if one is given; recorded if asked."""
    with nullcontext() if side is None else torch.cuda.stream(side.stream):
        compiled = kernel[grid](**arguments)
    active = recorder()
    if active is not None:
        active.launched(kernel, compiled, grid, arguments, side is not None)


def fork(device: torch.device) -> SideStream:
    """Return this thread's side stream, which has waited for the current stream's work so far.

    Only launches move there, the memory belongs to the current stream: :func:`join` before it is
    freed or read.
    """
    side = side_stream(device)
    side.fork(torch.cuda.current_stream(device))
    active = recorder()
    if active is not None:
        active.forked()
    return side


def join(side: SideStream, device: torch.device) -> None:
    """Let the current stream wait for the side stream's work."""
    side.join(torch.cuda.current_stream(device))
    active = recorder()
    if active is not None:
        active.joined()


@dataclass
class _Step:
    kind: int
    raw: RawLaunch | None = None
    operands: list[tuple[int, int]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Sees what a function launches and allocates while it runs.

    It holds on to every tensor that it sees, so that no two have the same address.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._inputs = tensors
        self._slots = {
            id(tensor): slot for slot, tensor in enumerate(tensors) if tensor is not None
        }
        self._allocated: list[Tensor] = []
        self._steps: list[_Step] = []
        self.obstacle: str | None = None
        self._forked = False
        given = [tensor for tensor in tensors if tensor is not None]
        # An operand given twice cannot be told apart; it need not be given twice the next time.
        self.ambiguous = len(self._slots) < len(given)

    def run(self, function: Callable[..., Result], options: tuple[Hashable, ...]) -> Result:
        """Run the function and watch it."""
        _recording.active = self
        try:
            with self:
                return function(*self._inputs, *options)
        finally:
            _recording.active = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._slots[id(result)] = len(self._inputs) + len(self._allocated)
            self._allocated.append(result)
        elif not func.is_view:
            self.obstacle = self.obstacle or f"it calls {func}"
        return result

    def launched(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        given: dict[str, Any],
        side: bool,
    ) -> None:
        """Keep a launch that was just made."""
        if getattr(kernel, "pre_run_hooks", None):
            self._stop(f"{kernel.__name__} has hooks of its own that run before it")
        arguments = [given[name] for name in kernel.arg_names if name in given]
        try:
            raw = RawLaunch(compiled, grid, arguments)
        except UnsupportedLaunch as error:
            self._stop(f"{kernel.__name__} cannot be launched directly: {error}")
            return
        operands = []
        for argument in arguments:
            if is_descriptor(argument):
                argument = argument.base
            if isinstance(argument, Tensor):
                operands.append(self._operand(argument))
        if side and not self._forked:
            self._stop(f"{kernel.__name__} is on a side stream that was not forked")
        self._steps.append(_Step(SIDE if side else MAIN, raw, operands))

    def forked(self) -> None:
        """Keep a fork."""
        self._forked = True
        self._steps.append(_Step(FORK))

    def joined(self) -> None:
        """Keep a join."""
        self._forked = False
        self._steps.append(_Step(JOIN))

    def recording(self, result: Sequence[Tensor | None]) -> Recording | None:
        """Return the recording, or None where the function cannot be recorded."""
        shapes: list[Output | None] = []
        number: dict[int, int] = {}
        for tensor in result:
            if tensor is None:
                shapes.append(None)
                continue
            slot, offset = self._operand(tensor)
            allocated = slot - len(self._inputs)
            if allocated < 0 or offset or slot in number or not _fills(tensor):
                self._stop("it returns something else than new tensors")
                return None
            number[slot] = len(self._inputs) + len(number)
            shapes.append((tensor.shape, tensor.stride(), tensor.dtype))
        if self._forked:
            self._stop("its side stream is not joined")
        if self.obstacle is not None:
            return None
        inputs = len(self._inputs)
        lives = _lifetimes(self._steps, self._allocated, inputs)
        temporary = [slot for slot in lives if slot not in number]
        offsets, size = pack([lives[slot] for slot in temporary])
        first = inputs + len(number)
        number |= {slot: first + index for index, slot in enumerate(temporary)}
        steps = [
            (step.kind, step.raw, [(number.get(slot, slot), at) for slot, at in step.operands])
            for step in self._steps
        ]
        device = next(tensor.device for tensor in self._inputs if tensor is not None)
        return Recording(device, shapes, offsets, size, steps)

    def _operand(self, tensor: Tensor) -> tuple[int, int]:
        """(slot, bytes from its start) of a tensor that is one of those seen, or a view of one."""
        slot = self._slots.get(id(tensor))
        if slot is not None:
            return slot, 0
        storage = tensor.untyped_storage().data_ptr()
        seen = [*self._inputs, *self._allocated]
        owners = [
            slot for slot, one in enumerate(seen)
            if one is not None and one.untyped_storage().data_ptr() == storage
        ]  # fmt: skip
        if len(owners) == 1:
            owner = seen[owners[0]]
            if owner is not None:
                return owners[0], tensor.data_ptr() - owner.data_ptr()
        if owners:
            self.ambiguous = True
        else:
            self._stop("it reads a tensor that is neither an operand nor its own")
        return 0, 0

    def _stop(self, reason: str) -> None:
        self.obstacle = self.obstacle or reason


def _fills(tensor: Tensor) -> bool:
    """Whether the tensor is all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes() > 0


def _lifetimes(
    steps: Sequence[_Step], allocated: Sequence[Tensor], inputs: int
) -> dict[int, Lifetime]:
    """When each allocation that a launch uses is alive, by slot; sizes are those of the storage.

    What a side stream uses lives from its fork to its join: in between, no order holds between
    the two streams.
    """
    alive: dict[int, tuple[int, int]] = {}
    fork = 0
    joins = [index for index, step in enumerate(steps) if step.kind == JOIN]
    for index, step in enumerate(steps):
        if step.kind == FORK:
            fork = index
        first, last = index, index
        if step.kind == SIDE:
            first, last = fork, next((join for join in joins if join > index), len(steps))
        for slot, _ in step.operands:
            if slot >= inputs:
                start, end = alive.get(slot, (first, last))
                alive[slot] = min(start, first), max(end, last)
    return {
        slot: Lifetime(allocated[slot - inputs].untyped_storage().nbytes(), *span)
        for slot, span in alive.items()
    }
