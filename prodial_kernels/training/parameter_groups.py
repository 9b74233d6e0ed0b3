"""Which trained tensors weight decay may pull towards zero."""

from __future__ import annotations

from typing import Any

from torch import nn


def adapter_parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups in which weight decay pulls towards the pretrained model.

    D_a, A and B are zero in the pretrained model, so they are decayed; the scale, kept as s − 1,
    is left out as every vector is. Of other trained modules (``modules_to_save``), tensors of two
    and more dimensions are decayed; biases and norm weights are not. Every trained parameter is in
    exactly one group.

    Args:
        model: A model after ``apply_prodial``; one without adapters works too.
        weight_decay: Decay of the decayed group, as ``torch.optim.AdamW`` takes it.

    Returns:
        One or two groups ``{"params": [...], "weight_decay": ...}``, for any ``torch.optim``
        optimiser.

    Raises:
        ValueError: A negative ``weight_decay``, or nothing to train.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The number of dimensions is enough: s is a vector, D_a, A and B are not.
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    kept = [parameter for parameter in trained if parameter.ndim < 2]
    if not trained:
        raise ValueError(
            "the model has no trainable parameter; call apply_prodial(model, config) before "
            "building the optimiser"
        )
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
