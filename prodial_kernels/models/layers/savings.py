"""What a run does to its model's blocks so that they save time and memory: norms, then levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from prodial_kernels.models.layers.fused_norms import KERNEL_ON, FusedNorms, fuse_norms
from prodial_kernels.models.layers.recompute import AppliedLevels, apply_levels


def apply_savings(
    model: nn.Module,
    levels: Sequence[str] | None,
    *,
    device: torch.device,
    say: Callable[[str], None] = lambda message: None,
) -> AppliedLevels:
    """Fuse a model's norms where there is a kernel for them, then give its blocks their levels.

    Call it after ``apply_prodial``, and take it back before adapters are removed or merged.

    Args:
        model: A model of transformers or mamba_ssm.
        levels: One for each block, as :func:`~prodial_kernels.models.layers.recompute.apply_levels`
            takes them; None to keep everything, in a model without a list of blocks too.
        device: Where the model runs.
        say: Told which norms were fused, if any.

    Returns:
        The levels; removing them gives the norms back as well.

    Raises:
        ValueError: Levels that do not fit the blocks; see ``apply_levels``.
    """
    norms = fuse_norms(model) if device.type in KERNEL_ON else FusedNorms()
    if len(norms):
        say(str(norms))
    applied = AppliedLevels([]) if levels is None else apply_levels(model, levels)
    # The levels go first: a block gets back the class that it had before.
    return AppliedLevels([norms, applied], checkpoints=applied.checkpoints)
