"""Quantised layers of other libraries whose weight a mixer reads, instead of calling the layer.

transformers' Mamba multiplies by ``dt_proj.weight``. Of a layer that bitsandbytes stores in 4 or 8
bits that is codes, so the model raises in its forward (``load_in_4bit``). This package's own layer
with the same stored tensors has the weight that the codes stand for.
"""

from __future__ import annotations

import torch
from torch import nn

from prodial_kernels.models.mixers.structure import weight_reads
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.foreign import from_foreign, is_foreign


class ReadWeight:
    """A layer in the place of another library's, until :meth:`remove`."""

    def __init__(self, owner: nn.Module, name: str, layer: QuantizedLinear) -> None:
        """Put ``layer`` at ``name`` of ``owner``."""
        self.owner, self.name, self.layer = owner, name, layer
        self.original = owner.get_submodule(name)
        setattr(owner, name, layer)

    def remove(self) -> None:
        """Put the original layer back, unless the layer has become another one, as by merging."""
        if getattr(self.owner, self.name) is self.layer:
            setattr(self.owner, self.name, self.original)


def own_read_weights(model: nn.Module, dtype: torch.dtype | None) -> list[ReadWeight]:
    """Replace the layers of ``model`` that are stored by another library and read by their owner.

    Args:
        model: Any module.
        dtype: What hidden states are in, where that is known.

    Returns:
        What undoes it, one per layer.

    Raises:
        ValueError: Such a layer is in a format that cannot be read exactly.
    """
    changes = []
    for path, owner in list(model.named_modules()):
        names = [name for name, child in owner.named_children() if is_foreign(child)]
        if not names:
            # Reading the bytecode of a whole class takes tens of milliseconds.
            continue
        for name in {name for _, name in weight_reads(type(owner), names)}:
            try:
                layer = from_foreign(owner.get_submodule(name), dtype)
            except ValueError as error:
                raise ValueError(
                    f"{path}.{name}, whose weight {type(owner).__name__} reads, cannot be read: "
                    f"{error}"
                ) from error
            layer.requires_grad_(False)
            changes.append(ReadWeight(owner, name, layer))
    return changes
