"""Run a model that is larger than the device: its blocks are there one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prodial_kernels.models.layers.blocks import blocks_of


@contextmanager
def blocks_on_demand(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a model on the CPU run on a device, forward only; ValueError without a list of blocks.

    What is not in a block (embedding, last norm, head) is on the device meanwhile; each block comes
    when it is called and goes again. Afterwards everything is on the CPU.
    """
    blocks = blocks_of(model)
    home = torch.device("cpu")

    def bring(block: nn.Module, _args: Any) -> None:
        block.to(device)

    def take_away(block: nn.Module, _args: Any, _output: Any) -> None:
        block.to(home)

    hooks = [block.register_forward_pre_hook(bring) for block in blocks]
    hooks += [block.register_forward_hook(take_away, always_call=True) for block in blocks]
    try:
        _move_the_rest(model, blocks, device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(home)


def _move_the_rest(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module in inside:
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                # In place, so that tied weights stay tied.
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
