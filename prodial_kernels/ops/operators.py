"""The operators that the dispatcher, torch.compile and autograd see. Imports no Triton.

Registered here rather than beside the kernels so that they exist before a graph is captured;
the kernels are imported when an operator first runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.detours import (
    add_low_rank,
    add_low_rank_gradient,
    dense_blocks_gradient,
    is_dense,
    is_small,
    is_thin,
    is_wide,
    low_rank_factors,
    low_rank_gradients,
    product_of,
    thin_gradients,
    tiled,
    tokens_of,
)

OPERANDS = (
    "Tensor x, Tensor weight, Tensor? blocks, Tensor? scale_deviation, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? bias, Tensor? seed"
)
OPTIONS = "float lora_scaling, float lora_dropout, bool relu"
NEEDS = "bool need_x, bool need_blocks, bool need_scale, bool need_a, bool need_b, bool need_bias"

_library = torch.library.Library("prodial_kernels", "DEF")
_library.define(f"linear_forward({OPERANDS}, {OPTIONS}, SymInt length) -> (Tensor y, Tensor h)")
_library.define(
    f"linear_backward(Tensor dy, {OPERANDS}, Tensor? y, Tensor? h, Tensor? scaled, {OPTIONS}, "
    f"{NEEDS}) -> (Tensor dx, Tensor dblocks, Tensor dscale, Tensor da, Tensor db, Tensor dbias)"
)


def linear_forward(
    x: Tensor, operands: Operands, options: ProjectionOptions, length: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The operator ``linear_forward``: X -> Y and H [M, padded r], None without LoRA.

    Calls the implementation directly unless a compiler, a dispatch mode or a tensor subclass has to
    see the operator. X is [M, K] or channel-first [b, K, l]; Y [M, N], or with a ``length``
    [M / length, N, length].
    """
    tensors = (x, *operands)
    if dispatched(tensors):
        y, h = torch.ops.prodial_kernels.linear_forward(*tensors, *scalars(options), length)
        return y, None if operands.lora_a is None else h
    if not length and is_small(x, operands):
        # Not below the dispatcher, whose operator always returns H.
        (y,) = replayed()(_small().recorded_forward, (x, *operands), (options,))
        return y, None
    return _forward(x, operands, options, length)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """The operator ``linear_backward``, called as :func:`linear_forward` calls its own.

    dY and Y have one layout, X and dX one: [M, features] or channel-first [b, features, l].
    """
    tensors = (dy, x, *operands, *kept)
    if not dispatched(tensors):
        return _backward(dy, x, operands, kept, options, needs)
    asked = (needs.x, *needs[2:])
    dx, *adapter = (
        gradient if need else None
        for gradient, need in zip(
            torch.ops.prodial_kernels.linear_backward(*tensors, *scalars(options), *asked),
            asked, strict=True,
        )
    )  # fmt: skip
    return Gradients(dx, None, *adapter)


def scaled_weight(operands: Operands) -> Tensor:
    """Return s ⊙ W, [N, K], which ``linear_backward`` takes as ``Kept.scaled``.

    Only for blocks that the kernels tile: otherwise the weight there is W D_b.
    """
    if operands.scale_deviation is None:
        raise ValueError("operands: without a scale the weight itself is what is multiplied by")
    tensors = operands.weight, operands.scale_deviation
    (scaled,) = replayed()(_projector().scaled_weight, tensors, ())
    made: Tensor = scaled
    return made


# How many dispatch modes are on. Private to torch; without it, the dispatcher sees every operator.
_DISPATCH_MODES: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)


def dispatched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a compiler, a dispatch mode or a tensor subclass has to see the operator.

    Selective checkpointing, FLOP counters, FakeTensorMode and torch.compile are such. Otherwise
    the dispatcher would only call the same function, some 10 µs later. Called below autograd.
    """
    if torch.compiler.is_compiling() or _DISPATCH_MODES is None or _DISPATCH_MODES():
        return True
    return not _PLAIN.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


@cache
def _projector() -> ModuleType:
    """The module of the kernels, imported when they first run."""
    from prodial_kernels.kernels.projector import passes

    return passes


@cache
def _small() -> ModuleType:
    """The same of small weights."""
    from prodial_kernels.kernels.projector import small_passes

    return small_passes


@cache
def replayed() -> Callable[..., Sequence[Any]]:
    """:func:`prodial_kernels.kernels.replay.recorded_calls.replayed`, imported likewise."""
    from prodial_kernels.kernels.replay.recorded_calls import replayed

    return replayed


def _forward(
    x: Tensor, operands: Operands, options: ProjectionOptions, length: int
) -> tuple[Tensor, Tensor | None]:
    run, function = replayed(), _projector().recorded_forward
    if not (is_wide(operands) or is_dense(operands.blocks)):
        y, h = run(function, (x, *operands), (options, length))
        return y, h
    with autocast_off(x.device.type):
        operands = tiled(operands, options)
        if not is_wide(operands):
            y, h = run(function, (x, *operands), (options, length))
            return y, h
        h, b = low_rank_factors(x, operands, options.lora_scaling)
        given = operands._replace(lora_a=None, lora_b=None)
        if _projector().adds_wide(x, given.weight, h.shape[1]):
            (y,) = run(_projector().recorded_wide_forward, (x, *given, h, b), (options, length))
        else:
            y, _ = run(function, (x, *given), (options, length))
            add_low_rank(y, h, b)
        return y, h


def _backward(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    wide, dense = is_wide(operands), is_dense(operands.blocks)
    if kept.y is None and kept.h is None and dy.ndim == 2 and is_small(x, operands):
        tensors = (dy, x, *operands)
        return Gradients(*replayed()(_small().recorded_backward, tensors, (options, needs)))
    if not (wide or dense):
        return _backward_by_kernels(dy, x, operands, kept, options, needs)
    with autocast_off(dy.device.type):
        dblocks = None
        if dense and needs.blocks:
            dblocks = dense_blocks_gradient(tokens_of(dy), tokens_of(x), operands, options)
            needs = needs._replace(blocks=False)
        backward = _backward_by_kernels
        if wide:
            backward = _backward_by_thin if is_thin(operands) else _backward_by_products
        gradients = backward(dy, x, tiled(operands, options), kept, options, needs)
        return gradients._replace(blocks=dblocks) if dense else gradients


def _backward_by_kernels(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    tensors = (dy, x, *operands, *kept)
    return Gradients(*replayed()(_projector().recorded_backward, tensors, (options, needs)))


def _backward_by_thin(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """Of wide ranks that the output side holds: the kernels without A, then what A asks for."""
    gradients = _backward_by_kernels(
        dy, x, operands._replace(lora_a=None), kept, options, needs._replace(lora_a=False)
    )
    da = thin_gradients(gradients.x, dy, x, operands, options.lora_scaling, needs)
    return gradients._replace(lora_a=da)


def _backward_by_products(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """The plan of wide ranks: the adapter's gradients from F = dYᵀ X, dX without LoRA at first."""
    da = db = dscale = dblocks = None
    if any(needs[2:-1]):
        product = product_of(dy, x)
        da, db = low_rank_gradients(product, operands, options.lora_scaling, needs)
        dscale, dblocks = replayed()(
            _projector().recorded_weight_sums, (product, *operands[:3]), (options, needs)
        )
    dx, *_, dbias = _backward_by_kernels(
        dy, x, operands._replace(lora_a=None, lora_b=None), Kept(scaled=kept.scaled), options,
        Needs(needs.x, False, False, False, False, False, needs.bias),
    )  # fmt: skip
    if dx is not None:
        add_low_rank_gradient(dx, dy, operands, options.lora_scaling)
    return Gradients(dx, None, dblocks, dscale, da, db, dbias)


# --- The operators as they are registered: flat, without None among the results. ----------------


def scalars(options: ProjectionOptions) -> tuple[float, float, bool]:
    """The fields of :data:`OPTIONS`."""
    return options.lora_scaling, options.lora_dropout, options.diagonal == "relu"


def _options(lora_scaling: float, lora_dropout: float, relu: bool) -> ProjectionOptions:
    return ProjectionOptions("triton", lora_scaling, lora_dropout, "relu" if relu else "free")


def _linear_forward(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    *operands, alpha, dropout, relu, length = flat
    y, h = _forward(x, Operands(*operands), _options(alpha, dropout, relu), length)
    return y, x.new_empty(0) if h is None else h


def _linear_forward_fake(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    operands, length = Operands(*flat[:7]), flat[-1]
    m, n = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[2], operands.weight.shape[0]
    y = x.new_empty(m // length, n, length) if length else x.new_empty(m, n)
    if operands.lora_a is None:
        return y, x.new_empty(0)
    return y, x.new_empty(m, padded_rank(operands.lora_a.shape[0]))


def _linear_backward(dy: Tensor, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    operands, kept = Operands(*flat[:7]), Kept(*flat[7:10])
    need_x, *need_adapter = flat[13:]
    dx, _, *adapter = _backward(
        dy, x, operands, kept, _options(*flat[10:13]), Needs(need_x, False, *need_adapter)
    )
    return tuple(dy.new_empty(0) if part is None else part for part in (dx, *adapter))


def _linear_backward_fake(dy: Tensor, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    return gradients_like(dy, x, Operands(*flat[:7]), flat[13:])


def gradients_like(
    dy: Tensor, x: Tensor, operands: Operands, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a backward operator returns, without values; empty where a gradient is not needed."""
    _, *adapter = operands
    return tuple(
        dy.new_empty(0)
        if part is None or not need
        else torch.empty_like(part, memory_format=torch.contiguous_format)
        for part, need in zip((x, *adapter[:-1]), needs, strict=True)
    )


# The CPU kernels run under the Triton interpreter only; functional.py refuses them otherwise.
for _key in ("CUDA", "CPU"):
    _library.impl("linear_forward", _linear_forward, _key)
    _library.impl("linear_backward", _linear_backward, _key)
torch.library.register_fake("prodial_kernels::linear_forward", _linear_forward_fake, lib=_library)
torch.library.register_fake("prodial_kernels::linear_backward", _linear_backward_fake, lib=_library)
