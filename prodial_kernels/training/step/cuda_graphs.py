"""CUDA graphs of whole steps: one stream, one pool, many graphs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[[], None]

_SYNCHRONISES = "called a synchronizing CUDA operation"


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
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.run(function)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        found: dict[str, None] = {}
        for warning in caught:
            if _SYNCHRONISES in str(warning.message):
                found[f"{warning.filename}:{warning.lineno}"] = None
        return list(found)

    def capture(self, function: Function) -> Function:
        """Capture a function, without running it, and return what runs it."""
        # What a step left behind would stay beside the graph's own memory.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            function()
        return graph.replay

    def release(self) -> None:
        """Give back the memory of graphs that nothing refers to any more."""
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()
