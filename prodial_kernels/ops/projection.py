"""A projector's forward and backward as plain functions, for use inside another autograd.Function.

A block that recomputes a projector's input in its own backward cannot leave the projector to
autograd, which would keep that input. Here nothing is kept: the caller says what it has.
Tokens are [b, l, features]; a channel-first tensor [b, features, l] is passed as its ``mT`` view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.ops import operators
from prodial_kernels.ops.dense_blocks import is_dense
from prodial_kernels.ops.layout import (
    direct_length,
    token_matrix,
    transposed,
)
from prodial_kernels.ops.operators import linear_backward, linear_forward
from prodial_kernels.ops.packed import PackedWeight
from prodial_kernels.ops.portable import torch_backward, torch_forward
from prodial_kernels.ops.wide_rank import is_wide


@dataclass(frozen=True)
class Rule:
    """What of a projector is not a tensor.

    Attributes:
        impl: ``"torch"``, ``"triton"``, or ``"plain"`` for a linear layer without an adapter,
            whose weight may ask for a gradient.
        lora_scaling: α.
        lora_dropout: Probability behind ``Operands.noise``; without noise there is no dropout.
        diagonal: ``"relu"`` or ``"free"``.
        packed: Where the weight's values are if ``Operands.weight`` is on the meta device.
    """

    impl: str
    lora_scaling: float = 0.0
    lora_dropout: float = 0.0
    diagonal: str = "relu"
    packed: PackedWeight | None = None

    def unpack(self, operands: Operands) -> Operands:
        """Return ``operands`` with a dense weight, which the caller must not keep."""
        if self.packed is None:
            return operands
        return operands._replace(weight=self.packed.dense(operands.weight.dtype))


class Operands(NamedTuple):
    """A projector's tensors: shapes as in :func:`prodial_kernels.functional.adapted_linear`.

    Of a packed weight, ``weight`` has shape and dtype only (meta device); see ``Rule.packed``.
    ``noise`` is what dropout is drawn from: the mask [b, l, K] of ``impl="torch"``, the seed [1]
    of ``impl="triton"``, None without dropout.
    """

    weight: Tensor
    blocks: Tensor | None = None
    scale_deviation: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None
    noise: Tensor | None = None


def takes_output(operands: Operands, rule: Rule) -> bool:
    """Whether the gradients of s and B are made from Y and from the kernels' H."""
    return rule.impl == "triton" and not is_wide(operands.lora_a, operands.noise)


class Needs(NamedTuple):
    """Which gradients are asked for, in the order of ``Operands``, the input's first."""

    x: bool
    weight: bool
    blocks: bool
    scale: bool
    lora_a: bool
    lora_b: bool
    bias: bool

    @property
    def input(self) -> bool:
        """Whether anything but the gradient towards ``x`` is asked for, which needs ``x``."""
        return any(self[1:-1])


class Gradients(NamedTuple):
    """Towards ``x`` and each of ``Operands`` (``scale``: towards s); None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    blocks: Tensor | None = None
    scale: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None


def project(
    x: Tensor, operands: Operands, rule: Rule, *, channel_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return Y and H = dropout(X) Aᵀ, which :func:`project_backward` takes back.

    Args:
        x: [b, l, K], any strides.
        operands: In the dtype of ``x`` where :func:`prodial_kernels.prodial_linear` asks for it.
        rule: The same in forward and backward.
        channel_first: Return Y as contiguous [b, N, l] instead of contiguous [b, l, N].
    """
    operands = rule.unpack(operands)
    weight = operands.weight
    if rule.impl == "plain":
        return _plain(x, weight, operands.bias, channel_first), None
    options = (rule.lora_scaling, rule.lora_dropout)
    h: Tensor | None
    if rule.impl == "triton":
        length = x.shape[1] if channel_first and direct_length(x.shape[1]) else 0
        y, h = linear_forward(token_matrix(x), *operands, *options, rule.diagonal == "relu", length)
        if not takes_output(operands, rule):
            h = None
        if length:
            return y, h
    else:
        y, h = torch_forward(x, *operands, *options, rule.diagonal)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return (transposed(y) if channel_first else y), h


LEAST_AHEAD = 2**22
"""Elements of a weight: a pass over fewer takes as long as going to another stream and back."""


def has_work_ahead(operands: Operands, rule: Rule) -> bool:
    """Whether to call :func:`scaled_weight` ahead of :func:`project_backward`."""
    return (
        rule.impl == "triton"
        and rule.packed is None
        and operands.scale_deviation is not None
        # Of larger blocks, W D_b is in W's place.
        and not is_dense(operands.blocks)
        and operands.weight.numel() >= LEAST_AHEAD
    )


def scaled_weight(operands: Operands) -> Tensor:
    """Return s ⊙ W, [N, K], as :func:`project_backward` makes it; see :func:`has_work_ahead`."""
    if operands.scale_deviation is None:
        raise ValueError("operands: without a scale the weight itself is what is multiplied by")
    return operators.scaled_weight(operands.weight, operands.scale_deviation)


def project_backward(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    h: Tensor | None,
    operands: Operands,
    rule: Rule,
    needs: Needs,
    *,
    channel_first: bool = False,
    into: Tensor | None = None,
    scaled: Tensor | None = None,
) -> Gradients:
    """Return the gradients that are asked for.

    Args:
        dy: Gradient towards Y, [b, l, N], any strides.
        x: [b, l, K], any strides; None is enough where ``needs.input`` is False.
        y: [b, l, N], any strides, or None: recomputed where the gradient towards s needs it.
        h: What :func:`project` returned, or None: recomputed together with ``y``.
        operands: As in the forward.
        rule: As in the forward.
        needs: Which gradients to compute.
        channel_first: Return dX as contiguous [b, K, l] instead of contiguous [b, l, K].
        into: Add dX to this tensor, in the layout asked for, and return it as dX.
        scaled: What :func:`scaled_weight` returned ahead of this.
    """
    if rule.impl == "plain":
        weight = rule.unpack(operands).weight if needs.x else operands.weight
        return _plain_backward(dy, x, weight, needs, channel_first, into)
    operands = rule.unpack(operands)
    options = (rule.lora_scaling, rule.lora_dropout)
    shape = (*dy.shape[:-1], operands.weight.shape[1])
    if x is None:
        x = dy.new_empty(shape[0], shape[2], shape[1]).mT if channel_first else dy.new_empty(shape)
    parts: tuple[Tensor | None, ...]
    if rule.impl == "triton":
        parts = _triton_backward(
            dy, x, y, h, operands, scaled, options, rule.diagonal == "relu", needs
        )
    else:
        if needs.lora_b and h is None:
            h = torch_forward(x, *operands, *options, rule.diagonal)[1]
        bias_dtype = None if operands.bias is None else operands.bias.dtype
        parts = torch_backward(
            (needs.x, *needs[2:]), dy, x, *operands[:5], h, operands.noise, *options,
            rule.diagonal, bias_dtype,
        )  # fmt: skip
    dx, *adapter = (
        part if needed else None for part, needed in zip(parts, (needs.x, *needs[2:]), strict=True)
    )
    if dx is not None:
        if into is not None:
            dx = into.add_(dx.mT if channel_first else dx)
        elif channel_first:
            dx = dx.mT if dx.mT.is_contiguous() else transposed(dx)
        else:
            dx = dx if dx.is_contiguous() else transposed(dx.mT)
    return Gradients(dx, None, *adapter)


def _triton_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    h: Tensor | None,
    operands: Operands,
    scaled: Tensor | None,
    options: tuple[float, float],
    relu: bool,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """The operator's gradients; dX is [b, l, K], stored as the matrix of tokens that X is."""
    gradient, matrix = token_matrix(dy), token_matrix(x)
    length = gradient.shape[2] if gradient.ndim == 3 else 0
    lora = operands.lora_a is not None
    wide = is_wide(operands.lora_a, operands.noise)  # whose gradients need neither Y nor H
    kept = None
    if needs.scale and y is not None and not wide:
        # One walk over the tokens reads dY and Y, so they share a layout.
        kept = token_matrix(y)
        if kept.ndim != gradient.ndim:
            kept = y.mT.contiguous() if length else y.reshape(-1, y.shape[-1])
    missing = (needs.scale and y is None) or (lora and (needs.scale or needs.lora_b) and h is None)
    if missing and not wide:
        fresh, h = linear_forward(matrix, *operands, *options, relu, length)
        kept = fresh if needs.scale and y is None else kept
    dx, *adapter = linear_backward(
        gradient, matrix, *operands, kept, h if lora else None, scaled, *options, relu,
        needs.x, *needs[2:],
    )  # fmt: skip
    if needs.x and dx is not None:
        dx = dx.mT if matrix.ndim == 3 else dx.view(x.shape)
    return (dx, *adapter)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, channel_first: bool) -> Tensor:
    """``X Wᵀ + b``; batched rather than flattened where that spares a transposed copy."""
    if not channel_first and x.is_contiguous():
        return F.linear(x, weight, bias)
    weights = weight.expand(x.shape[0], -1, -1)
    y = torch.bmm(weights, x.mT) if channel_first else torch.bmm(x, weights.mT)
    if bias is not None:
        y.add_(bias[:, None] if channel_first else bias)
    return y


def _plain_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    needs: Needs,
    channel_first: bool,
    into: Tensor | None,
) -> Gradients:
    dx = dweight = None
    if needs.x:
        weights = weight.expand(dy.shape[0], -1, -1)
        first, second = (weights.mT, dy.mT) if channel_first else (dy, weights)
        if into is not None:
            dx = into.baddbmm_(first, second)
        elif dy.is_contiguous() and not channel_first:
            dx = dy @ weight
        else:
            dx = torch.bmm(first, second)
    if needs.weight and x is not None:
        dweight = torch.einsum("bln,blk->nk", dy, x)
    dbias = dy.sum((0, 1)) if needs.bias else None
    return Gradients(x=dx, weight=dweight, bias=dbias)
