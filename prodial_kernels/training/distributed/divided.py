"""Frozen tensors that are divided among processes: as bytes, without regard to rows or dtypes.

All frozen tensors of a block make one run of bytes, of which every process keeps an equal part.
Gathering fills one buffer with all parts, and the block's tensors are views of it: nothing is
packed before or unpacked after, as it must be where each tensor is divided by its rows. A tensor
that lies in this process's part as a whole is a view of that, so that it need not be copied.
Nothing frozen has a gradient, so nothing is ever sent back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prodial_kernels.quantization import QuantizedLinear

ALIGNMENT = 256
"""Bytes that a tensor begins at a multiple of, as the allocator gives them."""
_UNEVEN = 1.02
"""By how much more than its share the first process may keep, so that its last tensor is whole."""


class Held(NamedTuple):
    """A module's dictionary of parameters, a key there, and the number of the tensor there."""

    place: dict[str, Any]
    name: str
    number: int


class Absent(Tensor):
    """Stands in a module for a tensor that is not whole here: shape, dtype and device, no values.

    To read it is an error; :meth:`full_tensor` is an operation of all processes, as a DTensor's.
    """

    gathered: Callable[[], Tensor]
    _is_param = True

    @staticmethod
    def of(tensor: Tensor, gathered: Callable[[], Tensor]) -> Absent:
        """Stand in for ``tensor``, which ``gathered`` returns a copy of."""
        absent: Absent = Tensor._make_wrapper_subclass(
            Absent, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype,
            device=tensor.device, requires_grad=False,
        )  # fmt: skip
        absent.gathered = gathered
        return absent

    def full_tensor(self) -> Tensor:
        """Return a copy with all values; every process must call it."""
        return self.gathered()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Say what it stands for."""
        return f"Absent({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse to compute; ``detach``, as ``state_dict`` calls it, gives another stand-in."""
        if function is torch.ops.aten.detach.default:
            return Absent.of(args[0], args[0].gathered)
        raise RuntimeError(
            f"{function} reads a weight that is divided among processes and gathered only while "
            "its block runs; full_tensor(), called in every process, returns it whole"
        )


class Divided:
    """The frozen tensors of one block, of which this process keeps a part.

    Attributes:
        part: Bytes that each process keeps.
        own: This process's, uint8 [part].
        flat: All of them, uint8 [size × part], in memory only while :attr:`whole`.
        whole: Whether the block's modules hold their tensors, or will when ``arrived`` has come.
        torn: What of ``own`` belongs to tensors that other processes keep the rest of.
        arrived: Recorded behind the transfer to ``flat``; None once it was waited for.
    """

    def __init__(
        self, tensors: Sequence[Tensor], held: Sequence[Held], device: torch.device, size: int
    ) -> None:
        """Describe what is to be divided; :meth:`divide` does it."""
        self.tensors = list(tensors)
        self.held = list(held)
        self._device = device
        self._offsets, self.part = _laid_out([_size_of(tensor) for tensor in tensors], size)
        self.size = size
        self.whole = True
        self.torn: list[slice] = []
        self.arrived: torch.cuda.Event | None = None

    def divide(self, own: Tensor, rank: int, gathered: Callable[[int], Tensor]) -> None:
        """Copy this process's part to ``own``, and drop the tensors' own memory.

        Args:
            own: uint8 [part], on the device.
            rank: Which part it is.
            gathered: Returns a copy of the tensor of a number, for what stands in for it.
        """
        self.own = own
        self.flat = torch.empty(self.part * self.size, dtype=torch.uint8, device=self._device)
        begin, end = rank * self.part, (rank + 1) * self.part
        for tensor, offset in zip(self.tensors, self._offsets, strict=True):
            n = _size_of(tensor)
            first, last = max(begin, offset), min(end, offset + n)
            here = slice(first - begin, last - begin)
            if first < last:
                raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
                own[here].copy_(raw[first - offset : last - offset])
            if last - first == n:
                whole = own[here]
            else:
                whole = self.flat[offset : offset + n]
                self.torn += [here] if first < last else []
            # In place: tied modules and whoever else refers to it keep it. Its version is its own,
            # so that gathering is no change of what autograd has saved.
            tensor.data = whole.view(tensor.dtype).view(tensor.shape)
        self._absent = [
            Absent.of(tensor, partial(gathered, number))
            for number, tensor in enumerate(self.tensors)
        ]
        self.drop()

    def drop(self) -> None:
        """Free the buffer, and let the modules hold what stands in for its tensors."""
        if not (self.whole and self.tensors):
            return
        self.wait()
        for place, name, number in self.held:
            place[name] = self._absent[number]
        self.flat.untyped_storage().resize_(0)
        self.whole = False

    def allocate(self) -> None:
        """Give the buffer memory, and the modules their tensors, which hold no values yet."""
        self.flat.untyped_storage().resize_(self.flat.numel())
        for place, name, number in self.held:
            place[name] = self.tensors[number]
        self.whole = True

    def wait(self) -> None:
        """Let the current stream wait until the values have arrived."""
        if self.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self.arrived)
            self.arrived = None


def frozen_of(blocks: Sequence[nn.Module], model: nn.Module) -> list[list[Tensor]]:
    """What is frozen in each block and held by no other, nor by anything around them.

    Parameters that are not trained, and the tensors that quantised weights are stored in.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        if id(module) not in inside:
            for held in _places(module):
                owners |= {id(tensor): {-1} for tensor in held.values()}
    found: list[dict[int, Tensor]] = []
    for index, block in enumerate(blocks):
        tensors = [t for m in block.modules() for held in _places(m) for t in held.values()]
        for tensor in tensors:
            owners.setdefault(id(tensor), set()).add(index)
        found.append({id(t): t for t in tensors if t is not None and not t.requires_grad})
    return [
        [tensor for key, tensor in tensors.items() if owners[key] == {index}]
        for index, tensors in enumerate(found)
    ]


def held_in(block: nn.Module, tensors: Sequence[Tensor]) -> list[Held]:
    """Every place in a block's modules that holds one of some tensors."""
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
    return [
        Held(place, name, numbers[id(tensor)])
        for module in block.modules()
        for place in _places(module)
        for name, tensor in place.items()
        if id(tensor) in numbers
    ]


def _places(module: nn.Module) -> list[dict[str, Any]]:
    """A module's parameters, and its buffers where these are a quantised weight."""
    stored = isinstance(module, QuantizedLinear)
    return [module._parameters, module._buffers] if stored else [module._parameters]


def _laid_out(sizes: Sequence[int], processes: int) -> tuple[list[int], int]:
    """Where tensors of so many bytes begin, one behind the other, and what each process keeps."""
    ends = [*itertools.accumulate(map(_rounded, sizes))]
    even = _rounded(-(-ends[-1] // processes)) if ends else 0
    # A little less evenly, two tensors of the same size behind a small one need not be torn.
    part = min((end for end in ends if even <= end <= even * _UNEVEN), default=even)
    return [0, *ends[:-1]], part


def _size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
