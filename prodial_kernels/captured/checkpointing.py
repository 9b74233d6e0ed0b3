"""Gradient checkpointing of transformers, which captured sections do themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

_FLAG = "gradient_checkpointing"


def is_checkpointed(block: nn.Module) -> bool:
    """Whether a block keeps only its input and is recomputed in backward.

    ``model.gradient_checkpointing_enable()`` sets this on every ``GradientCheckpointingLayer``.
    """
    return bool(vars(block).get(_FLAG, False))


def checkpoints_outside(block: nn.Module) -> bool:
    """Whether a block's checkpointing wraps its hooks too, rather than its ``forward`` alone.

    In transformers 5.17 it does, in 5.24 it does not.
    """
    classes = [cls for cls in type(block).__mro__ if cls is not nn.Module]
    return any("__call__" in vars(cls) for cls in classes)


def checkpoints_otherwise(block: nn.Module) -> bool:
    """Whether a block's checkpointing does more than :func:`torch.utils.checkpoint.checkpoint`.

    It may offload activations to the host, for example.
    """
    if not is_checkpointed(block):
        return False
    function = vars(block).get("_gradient_checkpointing_func")
    return getattr(function, "func", function) is not checkpoint


@contextmanager
def not_checkpointing(block: nn.Module) -> Iterator[None]:
    """Switch the block's own checkpointing off.

    It saves the random generator's state, which no graph can.
    """
    changed = [module for module in block.modules() if is_checkpointed(module)]
    for module in changed:
        setattr(module, _FLAG, False)
    try:
        yield
    finally:
        for module in changed:
            setattr(module, _FLAG, True)
