"""How the parts of divided weights come together: by a collective, or by copies from peers.

``collective`` is one all-gather, as NCCL does it: kernels of some multiprocessors, which the block
that computes meanwhile has to do without, and which wait for the slowest process. ``copies`` reads
the other processes' parts out of their memory by the copy engines: no multiprocessor, and nobody
waits, since what is frozen never changes. It takes GPUs of one machine that reach each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from prodial_kernels.training.distributed.launch import LaunchError

GATHERS = ("collective", "copies")


class Gather(Protocol):
    """Fills the buffers of blocks with what all processes keep of them."""

    def arena(self, size: int, device: torch.device) -> Tensor:
        """Return memory for everything that this process keeps, uint8 [size]."""

    def shared(self) -> None:
        """Wait until every process has filled its arena."""

    def into(self, flat: Tensor, own: Tensor) -> None:
        """Fill ``flat``, uint8 [size × part], from ``own``, a part of the arena, and the others'.

        On the current stream; every process calls it, for the same blocks in the same order.
        """


class Collective:
    """One all-gather of the process group."""

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        """Over ``group``; None for all processes."""
        self._group = group
        # As PyTorch 2.13 calls it; the name before is deprecated there.
        found: Any = getattr(distributed, "all_gather_single", None)
        self._all_gather: Callable[..., Any] = found or distributed.all_gather_into_tensor

    def arena(self, size: int, device: torch.device) -> Tensor:
        """See :class:`Gather`."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    def shared(self) -> None:
        """See :class:`Gather`: an all-gather waits by itself."""

    def into(self, flat: Tensor, own: Tensor) -> None:
        """See :class:`Gather`."""
        self._all_gather(flat, own, group=self._group)


class Copies:
    """Copies out of the memory of the other GPUs of this machine."""

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        """Over ``group``; None for all processes."""
        self._group: Any = group or distributed.group.WORLD
        self._arenas: list[Tensor] = []

    def arena(self, size: int, device: torch.device) -> Tensor:
        """See :class:`Gather`.

        Raises:
            LaunchError: The GPUs do not reach each other's memory.
        """
        # Nothing here is sent to several GPUs at once, and setting multicast up would be in vain.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric

        try:
            own: Tensor = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle: Any = symmetric.rendezvous(own, self._group.group_name)
            self._arenas = [
                own if rank == handle.rank else handle.get_buffer(rank, (size,), torch.uint8)
                for rank in range(handle.world_size)
            ]
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LaunchError(
                f"the GPUs of this run do not reach each other's memory ({first}); gather divided "
                "weights by 'collective'"
            ) from error
        # It holds the mappings.
        self._handle = handle
        return own

    def shared(self) -> None:
        """See :class:`Gather`."""
        torch.cuda.synchronize()
        distributed.barrier(self._group)

    def into(self, flat: Tensor, own: Tensor) -> None:
        """See :class:`Gather`."""
        begin = own.storage_offset()
        for place, arena in zip(flat.chunk(len(self._arenas)), self._arenas, strict=True):
            place.copy_(arena[begin : begin + own.numel()], non_blocking=True)


def gather_named(name: str, group: distributed.ProcessGroup | None = None) -> Gather:
    """Return the way to gather of one of :data:`GATHERS`.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in GATHERS:
        raise ValueError(f"gather: expected one of {GATHERS}, got {name!r}")
    return Copies(group) if name == "copies" else Collective(group)


def arenas(parts: Sequence[int], arena: Tensor) -> list[Tensor]:
    """The arena's parts of every block, one behind the other."""
    return list(arena[: sum(parts)].split(list(parts)))
