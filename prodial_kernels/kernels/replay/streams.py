"""A second stream, beside a large product, and where the host waits for any of them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

_threads = threading.local()

_SYNCHRONISES = "called a synchronizing CUDA operation"
# Torch's own warning about the check, once in a process.
_PROTOTYPE = "Synchronization debug mode is a prototype feature"

# Private to torch, which has it in builds for CUDA only.
_RAW_STREAM: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class SideStream:
    """A stream that work is forked to and joined from.

    One per thread and device, so that a graph captured by one thread never meets another thread's
    work, and with two events of its own: ``Stream.wait_stream`` makes a new one each time.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle: int = self.stream.cuda_stream
        self._forked, self._joined = torch.cuda.Event(), torch.cuda.Event()

    def fork(self, current: torch.cuda.Stream) -> None:
        """Let the side stream wait for the work that ``current`` has so far."""
        self._forked.record(current)
        self._forked.wait(self.stream)

    def join(self, current: torch.cuda.Stream) -> None:
        """Let ``current`` wait for the side stream's work."""
        self._joined.record(self.stream)
        self._joined.wait(current)


def side_stream(device: torch.device) -> SideStream:
    """Return this thread's side stream on ``device``, which is not the current one.

    It would be wherever a caller makes streams enough: torch has 32, which it hands out in turn.
    """
    pool: dict[torch.device, list[SideStream]] | None = getattr(_threads, "pool", None)
    if pool is None:
        pool = _threads.pool = {}
    sides = pool.setdefault(device, [])
    current = current_handle(device)
    for side in sides:
        if side.handle != current:
            return side
    sides.append(SideStream(device))
    return side_stream(device)


def current_handle(device: torch.device) -> int:
    """The handle of the current stream, without the object around it."""
    if _RAW_STREAM is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(_RAW_STREAM(device.index))


def watched_for_waits(function: Callable[[], Result]) -> tuple[Result, list[str]]:
    """Run a function; return its result, and where it waits for the device, which no graph can."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places: dict[str, None] = {}
    others = []
    for warning in caught:
        said = str(warning.message)
        if _SYNCHRONISES in said:
            places[f"{warning.filename}:{warning.lineno}"] = None
        elif _PROTOTYPE not in said:
            others.append(warning)
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, list(places)
