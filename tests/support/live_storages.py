"""Bytes of tensors that are alive, wherever they are held, autograd's graph included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Watches what is made while it is active; counts every storage once.

    Attributes:
        peak: The most bytes of it that were alive after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes(without=()))
        return result

    def bytes(self, *, without: Iterable[Tensor]) -> int:
        """What of it is alive now, storages of the tensors ``without`` left out."""
        out = {tensor.untyped_storage().data_ptr() for tensor in without}
        return sum(
            size
            for place, (reference, size) in self._made.items()
            if place not in out and not reference.expired()
        )


def bytes_kept(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that a forward pass leaves behind besides weights, inputs and outputs."""
    with LiveStorages() as live:
        output = module(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        return live.bytes(without=[*module.parameters(), *inputs, *outputs])
