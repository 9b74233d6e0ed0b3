"""The frozen weights of a model, divided among the processes of a run (FSDP2).

Each block's weights are whole on a device only while the block runs, forward or backward, and the
next block's are gathered meanwhile. What is trained stays whole everywhere: an adapter is small,
and its gradients are summed as without this (:mod:`.gradients`).
"""

from __future__ import annotations

import torch
from torch import nn

from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.distributed.launch import LaunchError


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Divide the frozen parameters of an adapted model among all processes, in place.

    Every process must call it, with the same model. At most one block more than a process's share
    is on the device at a time; from a model on the CPU, nothing else ever is.

    Args:
        model: With its adapter, on the CPU or on ``device``; in one piece.
        device: Where it is to run.

    Raises:
        LaunchError: It has quantised layers, whose weights FSDP2 does not divide.
        ValueError: It has no list of blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    quantised = [path for path, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if quantised:
        raise LaunchError(
            f"quantised weights, such as those of {quantised[0]}, cannot be divided among "
            "processes: leave `shard` or the quantisation out"
        )
    blocks = blocks_of(model)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        # In place: an optimiser and masters refer to it.
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    # What lies around the blocks: embeddings and the head stay whole from forward to backward,
    # because the loss reads the head's weight outside of the model.
    fully_shard(model, mesh=mesh, ignored_params=trained)
