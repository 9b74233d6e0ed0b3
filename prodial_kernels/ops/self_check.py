"""Whether the Triton kernels compute on a device what they should: one small product."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.ops.operators import linear_backward, linear_forward
from prodial_kernels.ops.portable import torch_backward, torch_forward

# Several tiles with a rest in either direction, and otherwise what layers have by default: on most
# devices these are the kernels that the caller's own product takes, compiled once for both.
_M, _K, _N, _R = 160, 96, 80, 16
_OPTIONS = ProjectionOptions("triton", lora_scaling=0.5)
_NEEDS = Needs(True, False, True, True, True, True, False)
_RESULTS = ("y", "dx", "dblocks", "dscale", "da", "db")
# Relative to the rounding unit: rounding costs about 0.4 of it as a root mean square.
_TYPICAL, _LARGEST = 2.0, 8.0


def difference(
    device: torch.device, dtype: torch.dtype, kernels: Callable[..., list[Tensor]] | None = None
) -> str | None:
    """Compare forward and backward of the kernels with the definition in fp64.

    Draws no random numbers and waits for the device, so not while a CUDA graph is captured.

    Args:
        device: A CUDA device.
        dtype: fp16 or bf16.
        kernels: What is compared, called as :func:`by_kernels`, which is the default.

    Returns:
        What differs, for people; None where nothing does.

    Raises:
        RuntimeError: The device does not work any more after the kernels ran.
    """
    # Counters, fake tensors, recorders: what watches the caller has no business here.
    unwatched = getattr(_python_dispatch, "_disable_current_modes", nullcontext)
    with unwatched(), torch.no_grad():
        try:
            return _compared(device, dtype, kernels or by_kernels)
        except Exception as error:  # whatever a compiler, a driver or a kernel raises
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as broken:
            raise RuntimeError(
                f"the Triton kernels left {device} unusable ({failed}); start again with "
                "impl='torch'"
            ) from broken
        return failed


def _compared(
    device: torch.device, dtype: torch.dtype, kernels: Callable[..., list[Tensor]]
) -> str | None:
    operands = _operands(dtype)
    exact = by_definition(*(tensor.double() for tensor in operands))
    found = kernels(*(tensor.to(device) for tensor in operands))
    unit = torch.finfo(dtype).eps
    for name, result, expected in zip(_RESULTS, found, exact, strict=True):
        error = result.double().cpu() - expected
        typical = float(error.norm() / expected.norm()) / unit
        largest = float(error.abs().max() / expected.abs().max()) / unit
        # "not <=" rather than ">": a NaN differs.
        if not (typical <= _TYPICAL and largest <= _LARGEST):
            return (
                f"{name} is {typical:.3g} rounding units from the definition, at most "
                f"{_TYPICAL:g} are right (its largest error {largest:.3g}, at most {_LARGEST:g})"
            )
    return None


def _operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """X, dY, W, D_a, s − 1, A and B on the CPU, always the same."""

    def wave(*shape: int, size: float, phase: float, dtype: torch.dtype = dtype) -> Tensor:
        count = torch.Size(shape).numel()
        at = torch.arange(count, dtype=torch.float64, device="cpu")
        # No multiple of it comes near a whole turn: as irregular as if it were drawn.
        return (size * torch.sin(at * at * 0.618034 + phase)).to(dtype).view(shape)

    single = torch.float32
    return (
        wave(_M, _K, size=1.4, phase=0.1),
        wave(_M, _N, size=1.4, phase=0.7),
        wave(_N, _K, size=1.4 * _K**-0.5, phase=0.2),
        wave(_K, 1, 1, size=0.3, phase=0.3, dtype=single),
        wave(_N, size=0.3, phase=0.4, dtype=single),
        wave(_R, _K, size=1.4 * _K**-0.5, phase=0.5, dtype=single),
        wave(_N, _R, size=0.7 * _R**-0.5, phase=0.6, dtype=single),
    )


def by_definition(x: Tensor, dy: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Y and the gradients in fp64."""
    operands = Operands(*tensors)
    y, h = torch_forward(x, operands, _OPTIONS)
    return _there(y, torch_backward(dy, x, operands, h, _OPTIONS, _NEEDS))


def by_kernels(x: Tensor, dy: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The same by the kernels."""
    operands = Operands(*tensors)
    y, h = linear_forward(x, operands, _OPTIONS)
    return _there(y, linear_backward(dy, x, operands, Kept(y, h), _OPTIONS, _NEEDS))


def _there(y: Tensor, gradients: Gradients) -> list[Tensor]:
    return [y, *(gradient for gradient in gradients if gradient is not None)]
