"""The interface of a capturing engine, and the description of what it captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from prodial_kernels.captured.leaves import Held

Result = TypeVar("Result")


class Source(NamedTuple):
    """A result of an earlier section, read in place."""

    position: int
    result: int


class Leaf(NamedTuple):
    """A tensor that a section takes.

    Attributes:
        place: Where the section reads it: the result of an earlier section, or the slot of this
            number, which is written before the replay. Sections that take one tensor share a slot.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    place: Source | int


@dataclass(frozen=True)
class Section:
    """The call of one block, or the calls of several consecutive ones, to be captured.

    Attributes:
        name: For messages.
        function: Takes the leaves, returns the results.
        leaves: The tensors it takes.
        parameters: The tensors that are trained in it.
        checkpointed: Keep nothing but the leaves, and recompute in backward.
        draws: Whether it draws random numbers.
        blocks: Number of blocks.
        held: Where its modules hold those parameters.
    """

    name: str
    function: Callable[[Sequence[Tensor]], list[Tensor]]
    leaves: tuple[Leaf, ...]
    parameters: tuple[Tensor, ...]
    checkpointed: bool = False
    draws: bool = False
    blocks: int = 1
    held: tuple[Held, ...] = ()


class Flat(NamedTuple):
    """Gradients of some parameters of one dtype, concatenated."""

    tensor: Tensor
    parameters: tuple[int, ...]


class Graphed(Protocol):
    """A captured section. Its tensors keep their addresses; later replays overwrite them.

    Attributes:
        inputs: The leaves; those in slots are written before the forward.
        results: Written by the forward; valid until its backward, so to be copied at once.
        result_gradients: Written before the backward; None where a result has no gradient.
        leaf_gradients: Written by the backward; valid until the next backward but one.
        parameter_gradients: Written by the backward; valid until the next backward.
    """

    inputs: list[Tensor]
    results: list[Tensor]
    result_gradients: list[Tensor | None]
    leaf_gradients: list[Tensor | None]
    parameter_gradients: list[Flat]

    def forward(self) -> Any:
        """Replay the forward; return the argument of its :meth:`backward`."""

    def backward(self, given: Any) -> None:
        """Replay the backward."""


class Engine(Protocol):
    """Captures sections; :class:`prodial_kernels.captured.cuda.CudaEngine`."""

    device: torch.device

    def capture(self, sections: Sequence[Section], held: int = 0) -> list[Graphed]:
        """Capture forwards in order and backwards in reverse order, as they will be replayed.

        ``held`` is about the number of bytes of large tensors that the pool holds at most; 0 if
        unknown.

        A replay may stop after any forward; the backwards of those replayed follow in reverse.
        """

    def watched(self, function: Callable[[], Result]) -> tuple[Result, list[str]]:
        """Run a function; return where in it the host waits for the device, which no graph can."""

    def allocated(self) -> int:
        """Bytes of large tensors that are allocated on the device; of small ones the pool has room.

        Whatever the allocator keeps apart as small.
        """

    def drawn(self) -> Any:
        """The state of the random generator; comparable."""

    def busy(self) -> bool:
        """Whether the current stream is being captured by somebody else."""

    def release(self) -> None:
        """Free the graphs' memory."""
