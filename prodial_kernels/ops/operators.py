"""The operators that the dispatcher, torch.compile and autograd see. Imports no Triton.

Registered here rather than beside the kernels so that they exist before a graph is captured;
the kernels are imported when an operator first runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.ops.dense_blocks import dense_blocks_gradient, is_dense, turned_weight
from prodial_kernels.ops.wide_rank import (
    add_low_rank,
    add_low_rank_gradient,
    is_wide,
    low_rank_gradients,
    product_of,
    tokens_of,
)

_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? blocks, Tensor? scale_deviation, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? bias, Tensor? seed"
)
_OPTIONS = "float lora_scaling, float lora_dropout, bool relu"
_NEEDS = "bool need_x, bool need_blocks, bool need_scale, bool need_a, bool need_b, bool need_bias"

_library = torch.library.Library("prodial_kernels", "DEF")
_library.define(f"linear_forward({_OPERANDS}, {_OPTIONS}, SymInt length) -> (Tensor y, Tensor h)")
_library.define(
    f"linear_backward(Tensor dy, {_OPERANDS}, Tensor? y, Tensor? h, Tensor? scaled, {_OPTIONS}, "
    f"{_NEEDS}) -> (Tensor dx, Tensor dblocks, Tensor dscale, Tensor da, Tensor db, Tensor dbias)"
)


def linear_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator ``linear_forward``, past the dispatcher where no one listens there."""
    if _dispatched(arguments):
        return torch.ops.prodial_kernels.linear_forward(*arguments)
    return _linear_forward(*arguments)


def linear_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """The operator ``linear_backward``, past the dispatcher where no one listens there.

    What was not asked for is None or empty.
    """
    if _dispatched(arguments):
        gradients: tuple[Tensor, ...] = torch.ops.prodial_kernels.linear_backward(*arguments)
        return gradients
    return _gradients(*arguments)


def scaled_weight(weight: Tensor, scale_deviation: Tensor) -> Tensor:
    """Return s ⊙ W, [N, K], which ``linear_backward`` takes instead of making it.

    Only for blocks that the kernels tile: otherwise the weight there is W D_b.
    """
    (scaled,) = _taped()(_projector().scaled_weight, (weight, scale_deviation), ())
    made: Tensor = scaled
    return made


# How many dispatch modes are on. Private to torch; without it, the dispatcher sees every operator.
_DISPATCH_MODES: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)


def _dispatched(arguments: tuple[Any, ...]) -> bool:
    """Whether a compiler, a dispatch mode or a tensor subclass has to see the operator.

    Selective checkpointing, FLOP counters, FakeTensorMode and torch.compile are such. Otherwise
    the dispatcher would only call the same function, some 10 µs later. Called below autograd.
    """
    if torch.compiler.is_compiling() or _DISPATCH_MODES is None or _DISPATCH_MODES():
        return True
    return not _PLAIN.issuperset(map(type, arguments))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float))


@cache
def _projector() -> ModuleType:
    """The module of the kernels, imported when they first run."""
    from prodial_kernels.kernels.projector import passes

    return passes


@cache
def _needs(*needs: bool) -> Hashable:
    """What the kernels' ``backward`` takes; one object for one choice."""
    made: Hashable = _projector().Needs(*needs)
    return made


@cache
def _taped() -> Callable[..., Sequence[Any]]:
    """:func:`prodial_kernels.kernels.replay.recorded_calls.taped`, imported likewise."""
    from prodial_kernels.kernels.replay.recorded_calls import taped

    return taped


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    relu: bool,
    length: int,
) -> tuple[Tensor, Tensor]:
    """X -> Y and H [M, padded r], empty without LoRA.

    X is [M, K] or channel-first [b, K, l]; Y [M, N], or with a ``length`` [M / length, N, length].
    """
    passes = _projector()
    if blocks is not None and is_dense(blocks):
        weight, blocks = turned_weight(weight, blocks, relu), None
    wide = None
    if lora_a is not None and lora_b is not None and is_wide(lora_a, seed):
        wide, lora_a, lora_b = (lora_a, lora_b), None, None
    y, h = _taped()(
        passes.forward, (x, weight, blocks, scale_deviation, lora_a, lora_b, bias, seed),
        (lora_scaling, lora_dropout, relu, length),
    )  # fmt: skip
    if wide is not None:
        h = add_low_rank(y, x, *wide, lora_scaling)
    return y, x.new_empty(0) if h is None else h


def _linear_forward_fake(
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    relu: bool,
    length: int,
) -> tuple[Tensor, Tensor]:
    m, n = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[2], weight.shape[0]
    y = x.new_empty(m // length, n, length) if length else x.new_empty(m, n)
    if lora_a is None:
        return y, x.new_empty(0)
    return y, x.new_empty(m, padded_rank(lora_a.shape[0]))


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor | None,
    h: Tensor | None,
    scaled: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    relu: bool,
    need_x: bool,
    need_blocks: bool,
    need_scale: bool,
    need_a: bool,
    need_b: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    """The six gradients; None for each that is not asked for.

    dY and Y have one layout, X and dX one: [M, features] or channel-first [b, features, l].
    ``scaled``: what :func:`scaled_weight` made, or None.
    """
    passes = _projector()
    dblocks = None
    if blocks is not None and is_dense(blocks):
        if need_blocks:
            dblocks = dense_blocks_gradient(
                tokens_of(dy), tokens_of(x), weight, blocks, scale_deviation, relu
            )
        weight, blocks, need_blocks = turned_weight(weight, blocks, relu), None, False
    if lora_a is not None and lora_b is not None and is_wide(lora_a, seed):
        da = db = dscale = wide_dblocks = None
        if need_blocks or need_scale or need_a or need_b:
            product = product_of(dy, x)
            da, db = low_rank_gradients(
                product, lora_a, lora_b, lora_scaling, need_a=need_a, need_b=need_b
            )
            dscale, wide_dblocks = _taped()(
                passes.weight_sums, (product, weight, blocks, scale_deviation),
                (relu, need_scale, need_blocks),
            )  # fmt: skip
        dx, *_, dbias = _gradients(
            dy, x, weight, blocks, scale_deviation, None, None, bias, None, None, None, scaled,
            lora_scaling, 0.0, relu, need_x, False, False, False, False, need_bias,
        )  # fmt: skip
        if dx is not None:
            add_low_rank_gradient(dx, dy, lora_a, lora_b, lora_scaling)
        return dx, wide_dblocks if dblocks is None else dblocks, dscale, da, db, dbias
    needs = _needs(need_x, need_blocks, need_scale, need_a, need_b, need_bias)
    dx, tiled_dblocks, *rest = _taped()(
        passes.backward,
        (dy, x, weight, blocks, scale_deviation, lora_a, lora_b, bias, seed, y, h, scaled),
        (lora_scaling, lora_dropout, relu, needs),
    )
    return dx, tiled_dblocks if dblocks is None else dblocks, *rest


def _linear_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The same as an operator may return it: empty where there is nothing."""
    gradients = _gradients(dy, *arguments)
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor | None,
    h: Tensor | None,
    scaled: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    relu: bool,
    need_x: bool,
    need_blocks: bool,
    need_scale: bool,
    need_a: bool,
    need_b: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    def like(part: Tensor | None, need: bool) -> Tensor:
        if part is None or not need:
            return dy.new_empty(0)
        return torch.empty_like(part, memory_format=torch.contiguous_format)

    return (
        like(x, need_x), like(blocks, need_blocks), like(scale_deviation, need_scale),
        like(lora_a, need_a), like(lora_b, need_b), like(bias, need_bias),
    )  # fmt: skip


# The CPU kernels run under the Triton interpreter only; functional.py refuses them otherwise.
for _key in ("CUDA", "CPU"):
    _library.impl("linear_forward", _linear_forward, _key)
    _library.impl("linear_backward", _linear_backward, _key)
torch.library.register_fake("prodial_kernels::linear_forward", _linear_forward_fake, lib=_library)
torch.library.register_fake("prodial_kernels::linear_backward", _linear_backward_fake, lib=_library)
