"""Prefetching operands on a side stream while other kernels run.

A mixer's backward is a chain of kernels that leave much of the memory bandwidth unused, and its
``in_proj`` then starts with passes over W and X that do not depend on that chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from prodial_kernels.kernels.replay.streams import side_stream

Result = TypeVar("Result")


class Prefetch(Generic[Result]):
    """A function's result, computed on a side stream concurrently with the current one.

    The function depends on the work that the current stream was given before this object was made.
    It is launched by :meth:`start`, so that kernels launched in between get the multiprocessors
    first. It allocates from this thread's side stream, which waits for the current stream before
    its next use; so the caller may drop the result once it has launched the kernels that read it.

    Args:
        device: A CUDA device; on a CPU the function runs in :meth:`start`.
        function: Allocates and launches on the current stream, and does not synchronise.
    """

    def __init__(self, device: torch.device, function: Callable[[], Result]) -> None:
        self._device, self._function = device, function
        self._side = side_stream(device) if device.type == "cuda" else None
        if self._side is not None:
            self._side.fork(torch.cuda.current_stream(device))

    def start(self) -> None:
        """Launch the function. Must be called, and :meth:`take` after it."""
        if self._side is None:
            self._result = self._function()
            return
        with torch.cuda.stream(self._side.stream):
            self._result = self._function()

    def take(self) -> Result:
        """Return the result; kernels launched on the current stream from now on may read it."""
        if self._side is not None:
            self._side.join(torch.cuda.current_stream(self._device))
        return self._result
