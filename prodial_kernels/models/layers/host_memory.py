"""Inputs of blocks that wait for their backward pass in the host's memory.

A block's input goes out while the next block runs, and comes back while the backward of the one
after it does, on a stream beside. Device memory holds the one on its way out, and in backward the
one in use and the next. Page-locked buffers are taken once and used again, so that steps can be
captured in a CUDA graph after the first.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_Kind = tuple[torch.Size, torch.dtype, torch.device]


class HostStore:
    """Sends tensors out and brings them back, the last one first; of one device at a time."""

    def __init__(self) -> None:
        """Make an empty store."""
        self._free: dict[_Kind, list[Tensor]] = defaultdict(list)
        self._sent: list[weakref.ref[Sent]] = []
        self._leaving: Sent | None = None
        self._stream: torch.cuda.Stream | None = None

    def send(self, tensor: Tensor) -> Sent:
        """Begin to copy a tensor to the host; its device memory is free when the next is sent."""
        self.settle()
        kind = (tensor.shape, tensor.dtype, tensor.device)
        free = self._free[kind]
        buffer = free.pop() if free else _buffer(tensor)
        sent = Sent(self, kind, buffer, tensor)
        if tensor.is_cuda:
            stream = self._beside(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                buffer.copy_(tensor, non_blocking=True)
        else:
            buffer.copy_(tensor)
        self._leaving = sent
        self._sent.append(weakref.ref(sent))
        return sent

    def settle(self) -> None:
        """Let go of the device memory of what was sent last, when it is out."""
        leaving, self._leaving = self._leaving, None
        if leaving is not None and leaving.here is not None:
            if leaving.here.is_cuda:
                current = torch.cuda.current_stream(leaving.here.device)
                current.wait_stream(self._beside(leaving.here.device))
            leaving.here = None

    def bring(self, sent: Sent) -> Tensor:
        """Return what was sent, on its device, and begin to bring what was sent before it."""
        if self._leaving is sent:
            # Still here.
            self._leaving = None
        self.settle()
        here = self._begin(sent)
        if here.is_cuda:
            torch.cuda.current_stream(here.device).wait_stream(self._beside(here.device))
        while self._sent:
            last = self._sent[-1]()
            if last is not None and last is not sent:
                self._begin(last)
                break
            self._sent.pop()
        return here

    def _begin(self, sent: Sent) -> Tensor:
        """Return the tensor on its device, where it is or to where its copy has begun."""
        if sent.here is not None:
            return sent.here
        shape, dtype, device = sent.kind
        # Of the current stream's memory, which the copy waits for.
        here = sent.here = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cuda":
            stream = self._beside(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                here.copy_(sent.buffer, non_blocking=True)
        else:
            here.copy_(sent.buffer)
        return here

    def give_back(self, kind: _Kind, buffer: Tensor) -> None:
        """Take a buffer back that nothing waits in any more."""
        self._free[kind].append(buffer)

    def _beside(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """Return an empty store: what waits belongs to a step of the model that was copied."""
        copied = memo[id(self)] = HostStore()
        return copied

    def __reduce__(self) -> Any:
        """Pickle an empty store."""
        return HostStore, ()


class Sent:
    """A tensor that is out: its buffer, and the tensor itself where it is here."""

    def __init__(self, store: HostStore, kind: _Kind, buffer: Tensor, here: Tensor | None) -> None:
        """Made by :meth:`HostStore.send`."""
        self.store = store
        self.kind = kind
        self.buffer = buffer
        self.here = here

    def __del__(self) -> None:
        self.store.give_back(self.kind, self.buffer)


def _buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
