"""Work that is begun before it is needed, beside what else the device does meanwhile.

A mixer's backward is a chain of kernels that leave much of the memory's bandwidth unused, and then
its ``in_proj`` begins with passes over W and X that need nothing of that chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from prodial_kernels.kernels.replay.streams import side_stream

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """A function's result, computed beside what the current stream does meanwhile.

    It waits for what that stream was given before this object was made, and for nothing since; the
    function itself is launched by :meth:`begin`, so that what was launched in between has the
    multiprocessors first. It runs on this thread's side stream, whose memory it takes. That memory
    returns to that stream alone, which waits again before it begins anything new, so the caller
    may drop the result as soon as it has launched what reads it.

    Args:
        device: Where; on a CPU the function simply runs.
        function: Allocates and launches on the current stream, and waits for nothing.
    """

    def __init__(self, device: torch.device, function: Callable[[], Result]) -> None:
        self._device, self._function = device, function
        self._side = side_stream(device) if device.type == "cuda" else None
        if self._side is not None:
            self._side.fork(torch.cuda.current_stream(device))

    def begin(self) -> None:
        """Launch the function. Has to be called, and :meth:`take` after it."""
        if self._side is None:
            self._result = self._function()
            return
        with torch.cuda.stream(self._side.stream):
            self._result = self._function()

    def take(self) -> Result:
        """Return the result; what is launched from now on may read it."""
        if self._side is not None:
            self._side.join(torch.cuda.current_stream(self._device))
        return self._result
