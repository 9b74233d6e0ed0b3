"""``HostStack``: experts that stay in the host's memory and come to the device when they are used.

What is large of a stored weight, its codes and their scales, is in page-locked memory. The experts
that a batch takes are copied a few at a time, on a stream beside, while the products of those
before run; then their memory is free again. Everything else about them is as of a
:class:`~prodial_kernels.quantization.modules.experts.QuantizedStack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.modules.experts import QuantizedStack

HOST_TENSORS = ("codes", "absmax")
"""Tensors of a stored weight that stay in the host's memory; what is left is small."""

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class HostStack(QuantizedStack):
    """Frozen weights [count, out_features, in_features] whose codes are in the host's memory.

    Its small tensors are buffers, on the device that products run on.
    """

    def __init__(self, count: int, like: QuantizedLinear) -> None:
        """Make room for ``count`` weights stored as that of ``like`` is, on its device."""
        # Tensors of the host's: no buffers, so that nothing moves them.
        vars(self)["host_tensors"] = {}
        vars(self)["coming"] = {}
        super().__init__(count, like)

    def _make_room(self, name: str, like: Tensor) -> None:
        if name not in HOST_TENSORS:
            super()._make_room(name, like)
            return
        shape = (self.count, *like.shape)
        host = torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        vars(self)["host_tensors"][name] = host

    def _room(self, name: str) -> Tensor:
        host: Tensor | None = vars(self)["host_tensors"].get(name)
        return super()._room(name) if host is None else host

    @property
    def device(self) -> torch.device:
        """Where its weights are used."""
        return next(self.buffers(recurse=False)).device

    @property
    def device_bytes(self) -> int:
        """Bytes that it has on the device all the time."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))

    def __getitem__(self, index: int) -> QuantizedLinear:
        """One weight as a layer, a copy on the device."""
        layer = super().__getitem__(index)
        for name in HOST_TENSORS:
            tensor = layer._buffers.get(name)
            if tensor is not None:
                layer._buffers[name] = tensor.to(self.device)
        return layer

    @torch.no_grad()
    def prefetch(self, known: list[int]) -> None:
        """Begin to copy the weights ``known`` to the device."""
        device, coming = self.device, vars(self)["coming"]
        host: dict[str, Tensor] = vars(self)["host_tensors"]
        # Of the current stream's memory, which the copies wait for.
        rooms = {
            name: torch.empty((len(known), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            for name, tensor in host.items()
        }
        arrived = None
        if device.type == "cuda":
            if device not in _STREAMS:
                _STREAMS[device] = torch.cuda.Stream(device)
            stream = _STREAMS[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                _copy(host, rooms, known)
                arrived = stream.record_event()
        else:
            _copy(host, rooms, known)
        coming[tuple(known)] = rooms, arrived

    @torch.no_grad()
    def unpack_some(self, ids: Tensor, known: list[int], out: Tensor) -> Tensor:
        """Dequantise the weights ``ids`` [g], on the host ``known``, to ``out`` [g, N, K]."""
        coming = vars(self)["coming"]
        if tuple(known) not in coming:
            self.prefetch(known)
        rooms, arrived = coming.pop(tuple(known))
        if arrived is not None:
            torch.cuda.current_stream(out.device).wait_event(arrived)
        packed = tuple(rooms[n] if n in rooms else self.get_buffer(n)[ids] for n in self._names)
        places = torch.arange(len(known), device=ids.device)
        like: QuantizedLinear = vars(self)["_like"]
        return like.unpack_some(packed, places, list(range(len(known))), out)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in vars(self)["host_tensors"].items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, tensor in vars(self)["host_tensors"].items():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape == tensor.shape:
                tensor.copy_(given)
        own = {
            name: value
            for name, value in state_dict.items()
            if name.removeprefix(prefix) not in vars(self)["host_tensors"]
        }
        super()._load_from_state_dict(own, prefix, *rest)


def _copy(host: dict[str, Tensor], rooms: dict[str, Tensor], known: list[int]) -> None:
    """Copy weights, those next to each other at once."""
    for start, stop, place in _runs(known):
        for name, tensor in host.items():
            rooms[name][place : place + stop - start].copy_(tensor[start:stop], non_blocking=True)


def _runs(known: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, one past the last, place of the first) of each run of numbers."""
    begin = 0
    for place in range(1, len(known) + 1):
        if place == len(known) or known[place] != known[place - 1] + 1:
            yield known[begin], known[place - 1] + 1, begin
            begin = place
