"""What one call launched and allocated, without the addresses, to be done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from prodial_kernels.kernels.replay.streams import SideStream, current_handle, side_stream

# The kinds of step on a recording; the first two also number the streams.
MAIN, SIDE, FORK, JOIN = range(4)

# Shape, strides and dtype.
Output = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Launch(Protocol):
    """A kernel whose stream and addresses are open; see ``raw_launch.RawLaunch``."""

    def bind(self, stream: int, addresses: Sequence[int]) -> Callable[[], None]:
        """Return the launch with both."""


# A kind and, for a launch, the kernel and its operands: each a slot and an offset in bytes.
Step = tuple[int, Launch | None, list[tuple[int, int]]]
# Combinations of addresses whose launches a recording keeps: the allocator hands out the same again
# and again to a training run, once a layer.
BOUND = 512


class Recording:
    """What one call launched and allocated, without addresses.

    Args:
        device: Where.
        outputs: Shape, strides and dtype of each result, or None.
        offsets: Where each temporary lies in the workspace, in bytes.
        size: Bytes of the workspace.
        steps: What to do in order: a kind, and for launches the kernel and its operands, each a
            slot and an offset in bytes. Slots count operands, then outputs, then temporaries.
    """

    def __init__(
        self,
        device: torch.device,
        outputs: Sequence[Output | None],
        offsets: Sequence[int],
        size: int,
        steps: Sequence[Step],
    ) -> None:
        self._device = device
        self._outputs = outputs
        self._offsets = offsets
        self._size = size
        self._steps = steps
        self._forks = any(kind == FORK for kind, _, _ in steps)
        self._bound: dict[tuple[int, ...], list[Callable[[], None]]] = {}

    def replay(self, addresses: list[int]) -> tuple[Tensor | None, ...]:
        """Do it again on operands at these addresses (0 for None); return new results."""
        device = self._device
        results: list[Tensor | None] = []
        for output in self._outputs:
            if output is None:
                results.append(None)
                continue
            shape, stride, dtype = output
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            addresses.append(tensor.data_ptr())
            results.append(tensor)
        if self._size:
            # Freed on return: the allocator hands it to later work of this stream only.
            workspace = torch.empty_strided((self._size,), (1,), dtype=torch.uint8, device=device)
            base = workspace.data_ptr()
            addresses.extend([base + offset for offset in self._offsets])
        side = side_stream(device) if self._forks else None
        where = current_handle(device), 0 if side is None else side.handle
        key = (*where, *addresses)
        launches = self._bound.get(key)
        if launches is None:
            launches = self._launches(where, side, addresses)
            if len(self._bound) >= BOUND:
                self._bound.clear()
            self._bound[key] = launches
        for launch in launches:
            launch()
        return tuple(results)

    def _launches(
        self, streams: tuple[int, int], side: SideStream | None, addresses: Sequence[int]
    ) -> list[Callable[[], None]]:
        """What is called in order, on these streams, by their handles, and addresses."""
        launches: list[Callable[[], None]] = []
        current = None if side is None else torch.cuda.current_stream(self._device)
        for kind, raw, operands in self._steps:
            if raw is not None:
                given = [addresses[slot] + offset for slot, offset in operands]
                launches.append(raw.bind(streams[kind], given))
            elif side is not None and current is not None:
                launches.append(partial(side.fork if kind == FORK else side.join, current))
        return launches
