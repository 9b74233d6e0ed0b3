"""Tensors that are divided among processes, as FSDP2's are: DTensors.

What reads their values is then an operation of all processes: each must call it, in the same order,
and each gets the values. Files are written by the first process only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor only."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values; every process must call it for a divided one."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy ``source``, which every process has whole, into a tensor or this process's part.

    A parameter that DeepSpeed trains (ZeRO-1 and 2) has a master in its optimiser, from which the
    next step would overwrite it: the master gets the values too.
    """
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(
            source,
            target.device_mesh,  # type: ignore[attr-defined]
            target.placements,  # type: ignore[attr-defined]
            # Every process has read the same.
            src_data_rank=None,
        )
    target.copy_(source)
    if master := getattr(target, "set_full_hp_param", None):
        master(source)


def by_the_first(write: Callable[[], None]) -> None:
    """Let the first of several processes write; the others return, or raise, when it has.

    Raises:
        OSError: In the others: it could not.
    """
    failure: BaseException | None = None
    if distributed.get_rank() == 0:
        try:
            write()
        except BaseException as error:
            failure = error
    told: list[str | None] = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise OSError(f"the first process could not write: {told[0]}")
