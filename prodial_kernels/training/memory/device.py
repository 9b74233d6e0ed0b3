"""The memory of a CUDA device: how much is free, a limit on what is used, what was used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MeasuredMemory:
    """What a run took of a device, in bytes.

    Attributes:
        allocated: Peak of PyTorch's tensors.
        reserved: Peak of what PyTorch's allocator held for them.
        outside: In use on the device outside PyTorch's allocator, at the end: the CUDA context,
            loaded kernels and, where there are any, other processes.
    """

    allocated: int
    reserved: int
    outside: int


def indexed(device: torch.device) -> torch.device:
    """Return a CUDA device with its index: the current one for plain ``cuda``.

    ``torch.cuda``'s functions for the share of a process take nothing else.
    """
    if device.index is not None:
        return device
    return torch.device(device.type, torch.cuda.current_device())


def usable_bytes(device: torch.device, *, context: int) -> int:
    """Return what a process could use in all: what is free, what it has, and its context."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) + context


@contextmanager
def limited(device: torch.device, allowed: int | None) -> Iterator[None]:
    """Keep PyTorch's allocator on a device within so many bytes; None for no limit.

    A larger device then behaves as a small one: what does not fit is an out-of-memory error.
    """
    if allowed is None:
        yield
        return
    device = indexed(device)
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, allowed / total)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def measure(device: torch.device) -> MeasuredMemory:
    """Return the peaks since the last ``torch.cuda.reset_peak_memory_stats``."""
    free, total = torch.cuda.mem_get_info(device)
    return MeasuredMemory(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        outside=max(0, total - free - torch.cuda.memory_reserved(device)),
    )
