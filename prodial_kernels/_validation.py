"""Every check of shapes, dtypes and devices that the operation makes, and its message."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from prodial_kernels._checks import divisors

TRITON_DTYPES = (torch.float16, torch.bfloat16)


def check_operands(
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    *,
    autocast: bool,
) -> None:
    """Check the operands of ``prodial_linear``, which gives their shapes, against each other.

    ``autocast`` will bring ``x`` and ``weight`` to one dtype.

    Raises:
        TypeError: A dtype that cannot be used.
        ValueError: A shape or device that does not fit.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"weight must have shape [out_features, in_features], got {list(weight.shape)}"
        )
    out_features, in_features = weight.shape
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating-point dtype, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x must have shape [..., in_features] = [..., {in_features}], got {list(x.shape)}"
        )
    if x.dtype != weight.dtype and not autocast:
        raise TypeError(
            f"x and weight must have the same dtype, got {x.dtype} and {weight.dtype}; cast x, "
            "convert the module with .to(dtype), or run under torch.autocast"
        )
    if blocks is not None and (
        blocks.ndim != 3
        or blocks.shape[1] != blocks.shape[2]
        or blocks.shape[0] * blocks.shape[1] != in_features
    ):
        raise ValueError(
            f"blocks must have shape [n_blocks, P, P] with n_blocks * P = in_features = "
            f"{in_features}, got {list(blocks.shape)}; P can be one of {divisors(in_features)}"
        )
    if scale is not None and scale.shape != (out_features,):
        raise ValueError(
            f"scale must have shape [out_features] = [{out_features}], got {list(scale.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"bias must have shape [out_features] = [{out_features}], got {list(bias.shape)}"
        )
    if (lora_a is None) != (lora_b is None):
        given, missing = ("lora_b", "lora_a") if lora_a is None else ("lora_a", "lora_b")
        raise ValueError(f"lora_a and lora_b belong together: got {given} but {missing} is None")
    if lora_a is not None and lora_b is not None:
        if lora_a.ndim != 2 or lora_a.shape[1] != in_features:
            raise ValueError(
                f"lora_a must have shape [r, in_features] = [r, {in_features}], "
                f"got {list(lora_a.shape)}"
            )
        if lora_b.shape != (out_features, lora_a.shape[0]):
            raise ValueError(
                f"lora_b must have shape [out_features, r] = [{out_features}, "
                f"{lora_a.shape[0]}], got {list(lora_b.shape)}"
            )
    device = x.device
    for operand in (weight, blocks, scale, lora_a, lora_b, bias):
        if operand is not None and (operand.device != device or not operand.is_floating_point()):
            names = {"weight": weight, "blocks": blocks, "scale": scale, "lora_a": lora_a,
                     "lora_b": lora_b, "bias": bias}  # fmt: skip
            name = next(name for name, one in names.items() if one is operand)
            if operand.device != device:
                raise ValueError(
                    f"{name} must be on the device of x, {device}, got {operand.device}; "
                    "move the module or the input"
                )
            raise TypeError(f"{name} must have a floating-point dtype, got {operand.dtype}")


def check_triton(x: Tensor) -> None:
    """Check that the Triton kernels can run on ``x``.

    Raises:
        RuntimeError: Not a CUDA tensor (and not under the Triton interpreter), or a device older
            than Ampere.
        TypeError: A dtype other than fp16 and bf16.
    """
    reason = triton_obstacle(x)
    if reason is None:
        return
    error = TypeError if x.dtype not in TRITON_DTYPES else RuntimeError
    raise error(f"impl='triton' cannot run: {reason}; use impl='auto' or impl='torch'")


def triton_obstacle(x: Tensor) -> str | None:
    """Say why the Triton kernels cannot run on ``x``; None where they can."""
    if x.dtype not in TRITON_DTYPES:
        return (
            f"x has dtype {x.dtype}, the kernels take float16 and bfloat16 (other dtypes do not "
            "run on 16-bit tensor cores, and cuBLAS sums them better)"
        )
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if x.device.type != "cuda":
        return f"x is on {x.device}, the kernels need a CUDA device"
    if device_capability(x.device) < (8, 0):
        return f"{torch.cuda.get_device_name(x.device)} is older than Ampere (sm_80)"
    return None


# The largest side of a diagonal block that is applied before rounding to fp8.
MAX_FP8_BLOCK = 128


def check_fp8(x: Tensor, blocks: Tensor | None, *, stored: bool, asked: str, chosen: str) -> None:
    """Check that ``compute="fp8"`` can run on ``x``.

    Args:
        x: The input.
        blocks: D_a, [n_blocks, P, P].
        stored: Whether the weight is stored in fp8.
        asked: The ``impl`` that was asked for.
        chosen: What it stands for on ``x``.

    Raises:
        RuntimeError: A GPU older than Ada, which has no fp8 tensor cores.
        TypeError: ``impl="auto"`` on a GPU with another dtype than the kernels take.
        ValueError: A dense weight, or diagonal blocks that are too large.
    """
    if not stored:
        raise ValueError(
            "compute='fp8' multiplies a weight that is stored in fp8, got a dense one; store it by "
            "quantize_model(model, 'fp8') before it is adapted (--quantize fp8), or use "
            "compute='same'"
        )
    if chosen == "triton" and blocks is not None and blocks.shape[-1] > MAX_FP8_BLOCK:
        raise ValueError(
            f"compute='fp8' takes diagonal blocks of at most {MAX_FP8_BLOCK}×{MAX_FP8_BLOCK} with "
            f"impl='triton', got {blocks.shape[-1]}; choose a smaller block_size, compute='same' "
            "or impl='torch'"
        )
    if not x.is_cuda:
        return
    if asked == "auto" and chosen == "torch":
        raise TypeError(
            f"compute='fp8' with impl='auto' cannot run on {x.dtype} here: fp8 tensor cores are "
            "used by the kernels alone, which take float16 and bfloat16; cast x, run under "
            "torch.autocast, or ask for impl='torch', which rounds as they do and saves no time"
        )
    if chosen != "triton":
        return
    if device_capability(x.device) < (8, 9):
        raise RuntimeError(
            f"compute='fp8' cannot run: {torch.cuda.get_device_name(x.device)} is older than Ada "
            "(sm_89) and has no fp8 tensor cores; use compute='same', or impl='torch', which "
            "rounds as they do and saves no time"
        )


def device_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, which PyTorch takes some microseconds to look up each time."""
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    return _remembered_capability(device)


@lru_cache
def _remembered_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def check_frozen(weight: Tensor) -> None:
    """Raise ValueError when ``weight`` expects a gradient that the operation will not give."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight is frozen in this operation and would get no gradient, but has "
            "requires_grad=True; call weight.requires_grad_(False), or use impl='reference' to "
            "train it too"
        )
