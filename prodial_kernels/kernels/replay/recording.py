"""What one call launched and allocated, without the addresses, to be done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prodial_kernels.kernels.replay.streams import current_handle, side_stream

# The kinds of step on a recording; the first two also number the streams.
MAIN, SIDE, FORK, JOIN = range(4)

# Shape, strides and dtype.
Output = tuple[torch.Size, tuple[int, ...], torch.dtype]
# A kind and, for a launch, the kernel and its operands: each a slot and an offset in bytes.
Step = tuple[int, Callable[[int, list[int]], None], list[tuple[int, int]]]


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
        if not self._forks:
            stream = current_handle(device)
            for _, raw, operands in self._steps:
                raw(stream, [addresses[slot] + offset for slot, offset in operands])
            return tuple(results)
        current, side = torch.cuda.current_stream(device), side_stream(device)
        streams = (current.cuda_stream, side.handle)
        for kind, raw, operands in self._steps:
            if kind == FORK:
                side.fork(current)
            elif kind == JOIN:
                side.join(current)
            else:
                raw(streams[kind], [addresses[slot] + offset for slot, offset in operands])
        return tuple(results)
