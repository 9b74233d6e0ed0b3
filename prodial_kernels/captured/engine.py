"""What captures, as :mod:`prodial_kernels.captured.chain` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Source(NamedTuple):
    """A result of an earlier section, which a section reads where that one left it."""

    position: int
    result: int


class Leaf(NamedTuple):
    """A tensor that a section takes.

    Attributes:
        place: Where it comes from: an earlier section, or a tensor of this number that is written
            before the replay. Sections that take the same one share its number.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    place: Source | int


@dataclass(frozen=True)
class Section:
    """One block's call, or those of several in a row, to be captured.

    Attributes:
        name: For messages.
        function: Takes the leaves, returns the results.
        leaves: What it takes.
        parameters: What is trained in it.
        checkpointed: Keep nothing but the leaves, and run it again in backward.
        draws: Whether it draws random numbers.
        blocks: How many blocks it stands for.
    """

    name: str
    function: Callable[[Sequence[Tensor]], list[Tensor]]
    leaves: tuple[Leaf, ...]
    parameters: tuple[Tensor, ...]
    checkpointed: bool = False
    draws: bool = False
    blocks: int = 1


class Flat(NamedTuple):
    """Gradients of some parameters of one dtype, one behind the other."""

    tensor: Tensor
    parameters: tuple[int, ...]


class Graphed(Protocol):
    """A captured section. Its tensors stay where they are, and later replays write over them.

    Attributes:
        inputs: The leaves, to be written where they have a number.
        results: What the forward leaves; whoever wants to keep one copies it at once.
        result_gradients: To be written before the backward; None where there is none.
        leaf_gradients: What the backward leaves; valid until the next backward but one.
        parameter_gradients: Likewise; valid until the next backward.
    """

    inputs: list[Tensor]
    results: list[Tensor]
    result_gradients: list[Tensor | None]
    leaf_gradients: list[Tensor | None]
    parameter_gradients: list[Flat]

    def forward(self) -> Any:
        """Replay the forward; return what the backward has to be given."""

    def backward(self, given: Any) -> None:
        """Replay the backward."""


class Engine(Protocol):
    """What captures; :class:`prodial_kernels.captured.cuda.CudaEngine`."""

    device: torch.device

    def capture(self, sections: Sequence[Section], kept: int = 0) -> list[Graphed]:
        """Capture forwards in order and backwards in reverse order, as they will be replayed.

        ``kept`` are the bytes that the forwards leave for the backwards, about; 0 if unknown.

        Any one forward may be the last that is replayed, if then the backwards of those that were
        are replayed in reverse order.
        """

    def watched(self, function: Callable[[], Result]) -> tuple[Result, list[str]]:
        """Run a function; return where it waits for the device, which no graph can do."""

    def allocated(self) -> int:
        """Bytes of the device that tensors take."""

    def drawn(self) -> Any:
        """Something that changes when random numbers are drawn."""

    def busy(self) -> bool:
        """Whether someone is capturing already."""

    def release(self) -> None:
        """Give memory back."""
