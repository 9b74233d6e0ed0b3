"""AdamW: what its weight decay is for, and its moments in 32 bits, 8 bits or paged 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels._checks import check_choice
from prodial_kernels.linear import BESIDE
from prodial_kernels.models.adapt.state import multipliers_of
from prodial_kernels.training.config import OPTIMIZERS

_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
# A and the skip connection of a state-space layer, Vim's backward direction included: at zero,
# where decay pulls, A_log makes every state forget alike and D cuts the input off.
_DYNAMICS = ("A_log", "D", "A_b_log", "D_b")


LR_SCALE = "lr_scale"
"""Key of a parameter group: what multiplies its learning rate, where that is not 1."""


class OptimizerError(RuntimeError):
    """An optimiser needs what this machine does not have."""


def adapter_parameter_groups(
    model: nn.Module, *, weight_decay: float, lr: float | None = None
) -> list[dict[str, Any]]:
    """Return optimiser groups in which weight decay pulls towards the pretrained model.

    D_a, A, B and the offsets of ``train_ssm`` are zero in the pretrained model, so they are
    decayed; the scale, kept as s − 1, is left out as every vector is. Of other trained modules
    (``modules_to_save``, or the whole model), tensors of two and more dimensions are decayed, but
    for biases, those that set a mixer's dynamics (A_log, D and the step size's bias) and what
    carries the mark ``_no_weight_decay``, as mamba_ssm's parameters do, whatever their shape. Every
    trained parameter is in exactly one group.

    Args:
        model: A model after ``apply_prodial``; one without adapters works too.
        weight_decay: Decay of the decayed group, as ``torch.optim.AdamW`` takes it.
        lr: Learning rate, which methods with a multiplier of their own need.

    Returns:
        One or two groups ``{"params": [...], "weight_decay": ...}``, for any ``torch.optim``
        optimiser, and one more for every other pair of multipliers that a method has. Where that of
        the learning rate is not 1, the group has its own ``"lr"``, and the multiplier as
        ``"lr_scale"`` for whoever sets learning rates later, as :func:`set_learning_rate` does;
        PyTorch's schedulers multiply what each group has.

    Raises:
        ValueError: A negative ``weight_decay``, nothing to train, or a method that multiplies the
            learning rate without ``lr``.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "the model has no trainable parameter; call apply_prodial(model, config) before "
            "building the optimiser"
        )
    multipliers = multipliers_of(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, 1.0): [], (0.0, 1.0): []}
    for name, parameter in trained:
        decay, scale = multipliers.get(id(parameter), (1.0, 1.0))
        decay = decay if _is_decayed(name, parameter) else 0.0
        groups.setdefault((decay, scale), []).append(parameter)
    scaled = sorted({scale for _, scale in groups if scale != 1.0})
    if scaled and lr is None:
        raise ValueError(
            f"a method multiplies the learning rate by {scaled[0]:g}: give lr, that of the "
            "optimiser, so that its group gets its own"
        )
    return [
        {"params": parameters, "weight_decay": weight_decay * decay}
        | ({} if lr is None or scale == 1.0 else {"lr": lr * scale, LR_SCALE: scale})
        for (decay, scale), parameters in groups.items()
        if parameters
    ]


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf.startswith(BESIDE):
        return True
    return (
        parameter.ndim >= 2
        and not getattr(parameter, "_no_weight_decay", False)
        and leaf not in _DYNAMICS
        and not leaf.endswith("bias")
    )


def make_optimizer(
    kind: str, groups: list[dict[str, Any]], *, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """Make an optimiser over parameter groups.

    Args:
        kind: ``"adamw"``: PyTorch's, fused on CUDA. ``"adamw8bit"`` and ``"paged_adamw8bit"``:
            bitsandbytes', which store the moments of tensors of 4,096 elements and more in 8 bits,
            paged ones in memory that moves to the host when the GPU's runs out.
        groups: As ``adapter_parameter_groups`` makes them.
        lr: Learning rate.
        device: Where the parameters are.

    Raises:
        OptimizerError: bitsandbytes is missing or cannot be loaded, or there is no CUDA device.
        ValueError: An unknown ``kind``.
    """
    check_optimizer(kind, device)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=device.type == "cuda")
    from bitsandbytes import optim

    made: torch.optim.Optimizer = getattr(optim, _BITSANDBYTES[kind])(groups, lr=lr)
    return made


def check_optimizer(kind: str, device: torch.device) -> None:
    """Raise as :func:`make_optimizer` unless it can make one for parameters on ``device``."""
    check_choice("kind", kind, OPTIMIZERS)
    if kind == "adamw":
        return
    if device.type != "cuda":
        raise OptimizerError(
            f"optimizer {kind!r} needs a CUDA device, the model is on {device.type!r}; use 'adamw'"
        )
    try:
        from bitsandbytes import optim  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise OptimizerError(
            f"optimizer {kind!r} needs bitsandbytes ({error}): pip install bitsandbytes, or use "
            "optimizer 'adamw'"
        ) from error


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimiser can be part of a CUDA graph, and leave out a bad step."""
    return isinstance(optimizer, torch.optim.AdamW) and all(
        group["fused"] for group in optimizer.param_groups
    )


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser read its learning rate on the device, where a captured step can."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            device = group["params"][0].device
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        group["capturable"] = True


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        own = lr * group.get(LR_SCALE, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimiser's state of one parameter as tensors that share no memory."""
    state = optimizer.state.get(parameter, {})
    # bitsandbytes counts steps in a Python int and shares its quantisation maps.
    return {kind: torch.as_tensor(value).clone() for kind, value in state.items()}


def check_state(
    optimizer: torch.optim.Optimizer,
    states: Mapping[nn.Parameter, Mapping[str, Tensor]],
    steps: int,
) -> None:
    """Raise ValueError unless states are as PyTorch's AdamW keeps them; others check on restoring.

    A parameter that never had a gradient has none.

    Args:
        optimizer: Whose states they are.
        states: What :func:`state_tensors` returned for each parameter.
        steps: Steps that the run has done. A parameter without a gradient in some, or a step left
            out for a gradient that is not finite, counts fewer.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for parameter, saved in states.items():
        if not saved:
            continue
        if saved.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"expected step, exp_avg and exp_avg_sq, got {', '.join(saved)}")
        for kind, value in saved.items():
            shape = torch.Size() if kind == "step" else parameter.shape
            dtype = torch.float32 if kind == "step" else parameter.dtype
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(
                    f"{kind} must be {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
        counted = float(saved["step"])
        if not (counted.is_integer() and 0 <= counted <= steps):
            raise ValueError(f"step must be a whole number from 0 to {steps}, got {counted:g}")


def restore_state(
    optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, Mapping[str, Tensor]]
) -> None:
    """Give an optimiser without state what :func:`state_tensors` returned for each parameter."""
    for index, group in enumerate(optimizer.param_groups):
        on_device = bool(group.get("fused") or group.get("capturable"))
        for place, parameter in enumerate(group["params"]):
            saved = states.get(parameter)
            if not saved:
                continue
            if hasattr(optimizer, "init_state"):
                # bitsandbytes decides where its state lives, in paged memory for one.
                optimizer.init_state(group, parameter, index, place)
                _fill(optimizer.state[parameter], saved)
                continue
            for kind, value in saved.items():
                # AdamW counts steps on the CPU unless it is fused.
                here = value.ndim or on_device
                optimizer.state[parameter][kind] = value.to(parameter.device) if here else value


def _fill(state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    if not state.keys() <= saved.keys():
        raise ValueError(f"{', '.join(sorted(state.keys() - saved.keys()))} missing")
    for kind, value in saved.items():
        if isinstance(state[kind], Tensor):
            state[kind].copy_(value)
        else:
            state[kind] = type(state[kind])(value.item())
