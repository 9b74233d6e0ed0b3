"""How much: the allocator's peak over one step, and what is kept between forward and backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """MiB; the allocator's figures are None where there is no CUDA allocator.

    Attributes:
        peak: Highest allocation during one step above what was allocated before it.
        held: Allocated between forward and backward above what was allocated before, the output
            included. It sees what a function keeps without telling autograd.
        kept: Storages that autograd saved for backward, each counted once, the frozen weight and
            the trained leaves left out, x and the output counted where they are saved.
    """

    peak: float | None
    held: float | None
    kept: float


def measure(
    forward: Callable[[], Tensor], both: Callable[[], None], own: Iterable[Tensor], cuda: bool
) -> Memory:
    """Measure one step. ``own`` are the weight and the leaves; the step has run before."""
    peak = held = None
    if cuda:
        _settle()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
        _settle()
        output = forward()
        held = (torch.cuda.memory_allocated() - before) / MIB
        del output
    return Memory(peak, held, kept_bytes(forward, own) / MIB)


def _settle() -> None:
    """Wait for the device, and until autograd's thread has let go of the last gradient.

    For a moment after the caller has that, the thread which computed it holds it too; it takes up
    another backward only then. Without this, one row of ten was off by the size of dX.
    """
    one = torch.ones(1, device="cuda", requires_grad=True)
    torch.autograd.grad(one * one, one)
    torch.cuda.synchronize()


def kept_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages saved for backward, without those of ``own``."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        # Detached: a saved output would otherwise hold its own graph, in a cycle.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(sizes.values())
    del output
    return total


def release(device: str, *, workspaces: bool = False) -> None:
    """Give the device back what is no longer referred to; of a CPU nothing, which takes seconds.

    Args:
        device: Where.
        workspaces: cuBLAS's too, of which it keeps one of 32 MiB for every stream it has seen; what
            ran before would count for a peak otherwise.
    """
    if not device.startswith("cuda"):
        return
    gc.collect()
    if workspaces:
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
