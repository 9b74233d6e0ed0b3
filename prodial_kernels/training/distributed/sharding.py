"""The frozen weights of a model, divided among the processes of a run.

Each block's weights are whole on a device only while the block runs, forward or backward; its
neighbours' are gathered meanwhile. What is trained stays whole everywhere: an adapter is small, and
its gradients are summed as without this (:mod:`.gradients`). So does what lies around the blocks,
embeddings and head: the peak of a step is where the loss reads the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.quantization.modules.experts import QuantizedStack
from prodial_kernels.training.distributed.divided import Divided, frozen_of, held_in
from prodial_kernels.training.distributed.gathering import Gather, arenas, gather_of
from prodial_kernels.training.distributed.launch import LaunchError

KEPT = 2
"""Blocks that stay whole from forward to backward: the last ones, which backward begins with."""


class DividedModel:
    """A model whose blocks' frozen weights are divided; made by :func:`shard_frozen`.

    Attributes:
        gather: How parts come together; may be replaced by another one between two steps.
        kept: How many of the last blocks stay whole from forward to backward; at least 2.
        blocks: What is divided of each block.
    """

    def __init__(
        self, model: nn.Module, modules: list[nn.Module], blocks: list[Divided], gather: Gather,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Gather around the calls of ``modules``, the blocks of ``model``, from now on."""
        self.blocks, self.gather, self.kept = blocks, gather, KEPT
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        # Blocks whose backward has begun, in which their forward may run again.
        self._returning: set[int] = set()
        _caller(model, modules).register_forward_pre_hook(self._begin, prepend=True)
        for index, module in enumerate(modules):
            module.register_forward_pre_hook(partial(self._before, index), prepend=True)
            module.register_forward_hook(partial(self._after, index))

    def __str__(self) -> str:
        processes = self.blocks[0].size
        return (
            f"frozen weights of {len(self.blocks)} blocks divided among {processes} processes, "
            f"gathered by {self.gather.said}"
        )

    def values(self, index: int, number: int) -> Tensor:
        """Return a copy of one tensor of a block, whole; every process must call it."""
        block = self.blocks[index]
        was_whole = block.whole
        self._need(index)
        tensor = block.tensors[number].detach().clone()
        if not was_whole:
            block.drop()
        return tensor

    def drop(self) -> None:
        """Drop what is whole beyond this process's parts, until a block runs again."""
        for block in self.blocks:
            block.drop()

    def _begin(self, *_: Any) -> None:
        """A forward through all blocks; what a backward leaves whole is what it begins with."""
        self._returning.clear()
        for block in self.blocks[2:]:
            block.drop()

    def _before(self, index: int, *_: Any) -> None:
        self._need(index)
        self._start(index + 1)

    def _after(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if index in self._returning:
            return
        outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for tensor in outputs:
            tensor.register_hook(partial(self._returns, index))
        if not outputs or index < len(self.blocks) - max(self.kept, KEPT):
            self.blocks[index].drop()

    def _returns(self, index: int, _: Tensor) -> None:
        """The gradient of a block's output is there: its backward comes next."""
        self._returning.add(index)
        self._need(index)
        # What the block after this one still has to compute may follow its input's gradient.
        if index + 2 < len(self.blocks):
            self.blocks[index + 2].drop()
        self._start(index - 1)

    def _need(self, index: int) -> None:
        self._start(index)
        self.blocks[index].wait()

    def _start(self, index: int) -> None:
        if not 0 <= index < len(self.blocks) or self.blocks[index].whole:
            return
        block = self.blocks[index]
        block.allocate()
        if self._stream is None:
            self.gather.into(block.flat, block.own, block.torn)
            return
        # The memory may be of a block that has just run.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self.gather.into(block.flat, block.own, block.torn)
            block.arrived = self._stream.record_event()


def shard_frozen(model: nn.Module, device: torch.device, *, gather: str = "auto") -> DividedModel:
    """Divide the frozen weights of an adapted model's blocks among all processes, in place.

    As they are stored: a quantised weight as its few bytes, dequantised where a product reads it.

    Every process must call it, with the same model. At most one block more than a process's share,
    and what lies around the blocks, is on the device at a time; from a model on the CPU, nothing
    else ever is. A training step needs up to three blocks whole.

    Args:
        model: With its adapter, on the CPU or on ``device``; in one piece.
        device: Where it is to run.
        gather: How parts come together: one of
            :data:`~prodial_kernels.training.distributed.gathering.GATHERS`.

    Raises:
        LaunchError: It has quantised experts; or copies were asked for, and are not possible
            between these devices.
        ValueError: It has no list of blocks, or there is no such ``gather``.
    """
    stacks = [path for path, m in model.named_modules() if isinstance(m, QuantizedStack)]
    if stacks:
        raise LaunchError(
            f"quantised experts, such as {stacks[0]}, cannot be divided among processes: leave "
            "`shard` out, or quantise the projectors only (`quantize_modules` 'projectors')"
        )
    modules = blocks_of(model)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    frozen = frozen_of(modules, model)
    divided = [
        Divided(tensors, held_in(module, tensors), device, size)
        for module, tensors in zip(modules, frozen, strict=True)
    ]
    parts = [block.part for block in divided]
    way, arena = gather_of(gather, sum(parts), device)
    places = arenas(parts, arena)
    whole = DividedModel(model, modules, divided, way, device)
    for index, (block, place) in enumerate(zip(divided, places, strict=True)):
        block.divide(place, rank, partial(whole.values, index))
    inside = {id(tensor) for tensors in frozen for tensor in tensors}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside and not hasattr(tensor, "full_tensor"):
            # In place: an optimiser and masters refer to it.
            tensor.data = tensor.data.to(device)
    way.shared()
    return whole


def _caller(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """The module that calls the blocks: the one that holds their list."""
    first = blocks[0]
    return next(
        module
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) and child[0] is first
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
