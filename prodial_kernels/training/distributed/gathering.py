"""How the parts of divided weights come together: by a collective, or by copies from peers.

``collective`` is one all-gather, as NCCL does it: kernels of some multiprocessors, which the block
that computes meanwhile has to do without, and which wait for the slowest process. ``copies`` reads
the other processes' parts out of their memory by the copy engines: no multiprocessor, and nobody
waits, since what is frozen never changes. It takes GPUs of one machine that reach each other;
``auto`` is copies where all processes have such, else the collective.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from prodial_kernels._checks import check_choice
from prodial_kernels.training.distributed.launch import LaunchError

GATHERS = ("auto", "collective", "copies")


class Gather(Protocol):
    """Fills the buffers of blocks with what all processes keep of them.

    Attributes:
        said: What it does, in a few words.
    """

    said: str

    def arena(self, size: int, device: torch.device) -> Tensor:
        """Return memory for everything that this process keeps, uint8 [size]."""

    def shared(self) -> None:
        """Wait until every process has filled its arena."""

    def into(self, flat: Tensor, own: Tensor, torn: Sequence[slice]) -> None:
        """Fill ``flat``, uint8 [size × part], from ``own``, a part of the arena, and the others'.

        Of ``own`` itself no more than the pieces ``torn`` is needed. On the current stream; every
        process calls it, for the same blocks in the same order.
        """


class Collective:
    """One all-gather of the process group."""

    said = "an all-gather for each block"

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

    def into(self, flat: Tensor, own: Tensor, torn: Sequence[slice]) -> None:
        """See :class:`Gather`."""
        self._all_gather(flat, own, group=self._group)


class Copies:
    """Copies out of the memory of the other GPUs of this machine."""

    said = "copies out of the memory of the other GPUs"

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
        try:
            import torch.distributed._symmetric_memory as symmetric

            own: Tensor = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle: Any = symmetric.rendezvous(own, self._group.group_name)
            self._arenas = [
                own if rank == handle.rank else handle.get_buffer(rank, (size,), torch.uint8)
                for rank in range(handle.world_size)
            ]
        except (RuntimeError, ImportError, AttributeError) as error:
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

    def into(self, flat: Tensor, own: Tensor, torn: Sequence[slice]) -> None:
        """See :class:`Gather`."""
        begin = own.storage_offset()
        for rank, place in enumerate(flat.split(own.numel())):
            pieces = torn if rank == self._handle.rank else [slice(0, own.numel())]
            part = self._arenas[rank][begin : begin + own.numel()]
            for piece in pieces:
                place[piece].copy_(part[piece], non_blocking=True)


def gather_of(
    name: str, size: int, device: torch.device, group: distributed.ProcessGroup | None = None
) -> tuple[Gather, Tensor]:
    """Return the way to gather of one of :data:`GATHERS`, and its arena, uint8 [size].

    Raises:
        LaunchError: ``"copies"``, and they are not possible between these devices.
        ValueError: There is none of this name.
    """
    check_choice("gather", name, GATHERS)
    if name == "copies":
        copies = Copies(group)
        return copies, copies.arena(size, device)
    collective = Collective(group)
    if name == "auto" and _agreed(_are_neighbours(device, group), device, group):
        copies, arena = Copies(group), None
        with suppress(LaunchError):
            arena = copies.arena(size, device)
        if _agreed(arena is not None, device, group) and arena is not None:
            return copies, arena
    return collective, collective.arena(size, device)


def _are_neighbours(device: torch.device, group: distributed.ProcessGroup | None) -> bool:
    """Whether all processes have GPUs of this machine that this one's reaches, as seen from it."""
    if device.type != "cuda":
        return False
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest()
    here = torch.cuda.current_device()
    own = torch.tensor([int.from_bytes(host, "big"), here], device=_told_on(device, group))
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, own, group=group)
    hosts, gpus = zip(*(each.tolist() for each in found), strict=True)
    reached = (gpu == here or torch.cuda.can_device_access_peer(here, gpu) for gpu in gpus)
    return len({*hosts}) == 1 and len({*gpus}) == len(gpus) and all(reached)


def _agreed(possible: bool, device: torch.device, group: distributed.ProcessGroup | None) -> bool:
    """Whether it is possible in every process; all must ask."""
    answer = torch.tensor(int(possible), device=_told_on(device, group))
    distributed.all_reduce(answer, distributed.ReduceOp.MIN, group=group)
    return bool(answer)


def _told_on(device: torch.device, group: distributed.ProcessGroup | None) -> torch.device:
    """Where a group exchanges a few numbers."""
    return torch.device("cpu") if distributed.get_backend(group) == "gloo" else device


def arenas(parts: Sequence[int], arena: Tensor) -> list[Tensor]:
    """The arena's parts of every block, one behind the other."""
    return list(arena[: sum(parts)].split(list(parts)))
