"""The operators of a projector in fp8, as ``ops/operators.py`` has those of the 16-bit one.

Matrices are token-first. A weight is its codes [N, K] float8_e4m3fn and their scales.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.ops.operators import (
    NEEDS,
    OPERANDS,
    OPTIONS,
    dispatched,
    gradients_like,
    replayed,
    scalars,
)

_library = torch.library.Library("prodial_kernels", "FRAGMENT")
_library.define(f"fp8_forward(Tensor scale_inv, {OPERANDS}, {OPTIONS}) -> (Tensor y, Tensor h)")
_library.define(
    f"fp8_backward(Tensor dy, Tensor scale_inv, {OPERANDS}, Tensor? y, Tensor? h, {OPTIONS}, "
    f"{NEEDS}) -> (Tensor dx, Tensor dblocks, Tensor dscale, Tensor da, Tensor db, Tensor dbias)"
)


def fp8_forward(
    x: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Tensor | None]:
    """X [M, K] -> Y [M, N] and H [M, padded r], None without LoRA; W is in ``options.packed``."""
    scale_inv, operands, options = _with_codes(operands, options)
    tensors = (scale_inv, x, *operands)
    if dispatched(tensors):
        y, h = torch.ops.prodial_kernels.fp8_forward(*tensors, *scalars(options))
        return y, None if operands.lora_a is None else h
    return _forward(scale_inv, x, operands, options)


def fp8_backward(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """The gradients that are asked for, from dY [M, N], X [M, K] and the Y and H of forward."""
    scale_inv, operands, options = _with_codes(operands, options)
    tensors = (dy, scale_inv, x, *operands, kept.y, kept.h)
    if not dispatched(tensors):
        return _backward(dy, scale_inv, x, operands, kept, options, needs)
    asked = (needs.x, *needs[2:])
    dx, *adapter = (
        gradient if need else None
        for gradient, need in zip(
            torch.ops.prodial_kernels.fp8_backward(*tensors, *scalars(options), *asked),
            asked, strict=True,
        )
    )  # fmt: skip
    return Gradients(dx, None, *adapter)


def _with_codes(
    operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Operands, ProjectionOptions]:
    """The weight's scales, and operands with its codes in its place."""
    if options.packed is None:
        raise ValueError("compute='fp8' takes a weight that is stored in fp8, got a dense one")
    codes, scale_inv = options.packed.stored()
    return scale_inv, operands._replace(weight=codes), options._replace(packed=None)


@cache
def _passes() -> ModuleType:
    """The module of the kernels, imported when they first run."""
    from prodial_kernels.kernels.fp8 import passes

    return passes


def _forward(
    scale_inv: Tensor, x: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Tensor | None]:
    passes: Any = _passes()
    if passes.by_library(x.shape[0], operands, x.device, towards_input=False):
        made: tuple[Tensor, Tensor | None]
        made = passes.forward_by_library(x, scale_inv, operands, options)
        return made
    y, h = replayed()(passes.recorded_forward, (x, scale_inv, *operands), (options,))
    return y, h


def _backward(
    dy: Tensor,
    scale_inv: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    passes: Any = _passes()
    through_weight = needs.x or (needs.blocks and operands.blocks is not None)
    if through_weight and passes.by_library(dy.shape[0], operands, dy.device, towards_input=True):
        gradients: Gradients
        gradients = passes.backward_by_library(dy, x, scale_inv, operands, kept, options, needs)
        return gradients
    tensors = (dy, x, scale_inv, *operands, *kept)
    return Gradients(*replayed()(passes.recorded_backward, tensors, (options, needs)))


# --- The operators as they are registered: flat, without None among the results. ----------------


def _options(lora_scaling: float, lora_dropout: float, relu: bool) -> ProjectionOptions:
    return ProjectionOptions(
        "triton", lora_scaling, lora_dropout, "relu" if relu else "free", compute="fp8"
    )


def _fp8_forward(scale_inv: Tensor, x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    y, h = _forward(scale_inv, x, Operands(*flat[:7]), _options(*flat[7:]))
    return y, x.new_empty(0) if h is None else h


def _fp8_forward_fake(scale_inv: Tensor, x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(*flat[:7])
    y = x.new_empty(x.shape[0], operands.weight.shape[0])
    if operands.lora_a is None:
        return y, x.new_empty(0)
    return y, x.new_empty(x.shape[0], padded_rank(operands.lora_a.shape[0]))


def _fp8_backward(dy: Tensor, scale_inv: Tensor, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    need_x, *need_adapter = flat[12:]
    dx, _, *adapter = _backward(
        dy, scale_inv, x, Operands(*flat[:7]), Kept(*flat[7:9]), _options(*flat[9:12]),
        Needs(need_x, False, *need_adapter),
    )  # fmt: skip
    return tuple(dy.new_empty(0) if part is None else part for part in (dx, *adapter))


def _fp8_backward_fake(dy: Tensor, scale_inv: Tensor, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    return gradients_like(dy, x, Operands(*flat[:7]), flat[12:])


# On a CPU under the Triton interpreter only; functional.py refuses it otherwise.
for _key in ("CUDA", "CPU"):
    _library.impl("fp8_forward", _fp8_forward, _key)
    _library.impl("fp8_backward", _fp8_backward, _key)
torch.library.register_fake("prodial_kernels::fp8_forward", _fp8_forward_fake, lib=_library)
torch.library.register_fake("prodial_kernels::fp8_backward", _fp8_backward_fake, lib=_library)
