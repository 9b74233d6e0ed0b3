"""Which implementation a model's adapted projectors run by, for people."""

from __future__ import annotations

import torch
from torch import nn

from prodial_kernels._validation import triton_obstacle
from prodial_kernels.linear import adapted_layers, weight_like
from prodial_kernels.ops.implementation import choose_impl
from prodial_kernels.training.options import ConfigError


def check_implementation(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError unless ``impl`` can compute in ``dtype`` on ``device``."""
    if impl == "triton":
        reason = triton_obstacle(torch.empty(0, dtype=dtype, device=device))
        if reason is not None:
            raise ConfigError(
                f"`impl` 'triton' cannot run: {reason.replace('x ', 'the model ', 1)}; leave it out"
            )


def set_implementation(model: nn.Module, impl: str) -> None:
    """Let every adapted projector of a model run by ``impl``."""
    for layer in adapted_layers(model).values():
        layer.impl = impl


def implementation_of(model: nn.Module) -> str | None:
    """Say what the adapted projectors run by, and why not by the kernels; None without any.

    Where ``impl="auto"`` takes the kernels it makes their check now, before anything is captured.
    """
    layers = [*adapted_layers(model).values()]
    if not layers:
        return None
    like = weight_like(layers[0].base_layer)
    choice = choose_impl(layers[0].impl, like)
    device = torch.cuda.get_device_name(like.device) if like.is_cuda else like.device.type
    asked = "" if layers[0].impl == "auto" else ", as asked for"
    why = f" ({choice.obstacle})" if like.is_cuda and choice.obstacle else ""
    return f"{choice.impl} on {device}{asked}{why}"
