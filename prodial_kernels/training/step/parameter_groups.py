"""Which trained tensors weight decay may pull towards zero."""

from __future__ import annotations

from typing import Any

from torch import nn

# A and the skip connection of a state-space layer, Vim's backward direction included: at zero,
# where decay pulls, A_log makes every state forget alike and D cuts the input off.
_DYNAMICS = ("A_log", "D", "A_b_log", "D_b")


def adapter_parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups in which weight decay pulls towards the pretrained model.

    D_a, A and B are zero in the pretrained model, so they are decayed; the scale, kept as s − 1,
    is left out as every vector is. Of other trained modules (``modules_to_save``, or the whole
    model), tensors of two and more dimensions are decayed, but for biases, those that set a
    mixer's dynamics (A_log, D and the step size's bias) and what carries the mark
    ``_no_weight_decay``, as mamba_ssm's parameters do, whatever their shape. Every trained
    parameter is in exactly one group.

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
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [parameter for name, parameter in trained if _is_decayed(name, parameter)]
    kept = [parameter for name, parameter in trained if not _is_decayed(name, parameter)]
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


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    leaf = name.rpartition(".")[2]
    return (
        parameter.ndim >= 2
        and not getattr(parameter, "_no_weight_decay", False)
        and leaf not in _DYNAMICS
        and not leaf.endswith("bias")
    )
