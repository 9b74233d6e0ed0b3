"""A projector's forward and backward as plain functions, for use inside an autograd.Function.

A block that recomputes a projector's input in its own backward cannot leave the projector to
autograd, which would keep that input. Here nothing is kept: the caller says what it has.
Tokens are [b, l, features]; a channel-first tensor [b, features, l] is passed as its ``mT`` view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.detours import is_dense, is_small, is_thin, is_wide
from prodial_kernels.ops.layout import direct_length, token_matrix, transposed
from prodial_kernels.ops.operators import linear_backward, linear_forward
from prodial_kernels.ops.portable import torch_backward, torch_forward
from prodial_kernels.ops.products import wide_product
from prodial_kernels.ops.stored.operators import fp8_backward, fp8_forward


def takes_output(operands: Operands, options: ProjectionOptions) -> bool:
    """Whether the gradients of s and B are made from Y and from the kernels' H."""
    return options.impl == "triton" and (
        options.compute == "fp8" or is_thin(operands) or not is_wide(operands)
    )


def takes_channel_first(options: ProjectionOptions) -> bool:
    """Whether matrices may be channel-first: for the kernels, but for those in fp8."""
    return options.impl == "triton" and options.compute != "fp8"


def _in_fp8(options: ProjectionOptions) -> bool:
    """Whether the weight's stored codes are multiplied as they are."""
    return options.impl == "triton" and options.compute == "fp8"


def forward(
    x: Tensor, operands: Operands, options: ProjectionOptions, length: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Return Y [M, N] (of ``"plain"`` [b, l, N]), and H = dropout(X) Aᵀ where backward takes it.

    Args:
        x: [..., K]; with ``"triton"`` as :func:`~prodial_kernels.ops.layout.token_matrix` gives it.
        operands: In the dtype of ``x`` where :func:`prodial_kernels.prodial_linear` asks for it.
        options: The same in forward and backward.
        length: With ``"triton"``, return Y as [M / length, N, length] instead of [M, N].
    """
    if _in_fp8(options):
        return fp8_forward(x, operands, options)
    if options.packed is not None:
        operands, options = _unpacked(operands, options)
    if options.impl == "triton":
        y, h = linear_forward(x, operands, options, length)
        return y, h if takes_output(operands, options) else None
    with autocast_off(x.device.type):
        if options.impl == "torch":
            return torch_forward(x, operands, options)
        return _plain(_sequences(x), operands, channel_first=False), None


def backward(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """Return the gradients that are asked for.

    dY is [..., N], X [..., K]. With ``"triton"``, dY and Y have one layout, X and dX one: matrices
    of tokens, or channel-first. The dX of ``"torch"`` is like X, that of ``"plain"`` [b, l, K].
    """
    if _in_fp8(options):
        return fp8_backward(dy, x, operands, kept, options, needs)
    if options.packed is not None and (needs.x or options.impl != "plain"):
        operands, options = _unpacked(operands, options)
    if options.impl == "triton":
        return linear_backward(dy, x, operands, kept, options, needs)
    with autocast_off(dy.device.type):
        if options.impl == "torch":
            return torch_backward(dy, x, operands, kept.h, options, needs)
        given = _sequences(x) if needs.weight else None
        return _plain_backward(_sequences(dy), given, operands, needs)


def project(
    x: Tensor, operands: Operands, options: ProjectionOptions, *, channel_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return Y and H = dropout(X) Aᵀ, which :func:`project_backward` takes back.

    Args:
        x: [b, l, K], any strides.
        operands: In the dtype of ``x`` where :func:`prodial_kernels.prodial_linear` asks for it.
        options: The same in forward and backward.
        channel_first: Return Y as contiguous [b, N, l] instead of contiguous [b, l, N].
    """
    if options.impl == "plain":
        return _plain(x, _unpacked(operands, options)[0], channel_first), None
    if options.impl == "triton":
        direct = takes_channel_first(options)
        length = x.shape[1] if direct and channel_first and direct_length(x.shape[1]) else 0
        y, h = forward(token_matrix(x, direct=direct), operands, options, length)
        if length:
            return y, h
    else:
        y, h = forward(x, operands, options)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return (transposed(y) if channel_first else y), h


LEAST_PREFETCHED = 2**22
"""Elements of a weight below which switching streams takes as long as the pass over them."""


def can_prefetch(operands: Operands, options: ProjectionOptions) -> bool:
    """Whether to prefetch ``operators.scaled_weight`` for :func:`project_backward`."""
    return (
        options.impl == "triton"
        and options.packed is None
        and operands.scale_deviation is not None
        # Of larger blocks, W D_b is in W's place.
        and not is_dense(operands.blocks)
        and operands.weight.numel() >= LEAST_PREFETCHED
    )


def project_backward(
    dy: Tensor,
    x: Tensor | None,
    kept: Kept,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
    *,
    channel_first: bool = False,
    into: Tensor | None = None,
) -> Gradients:
    """Return the gradients that are asked for.

    Args:
        dy: Gradient towards Y, [b, l, N], any strides.
        x: [b, l, K], any strides; None is enough where ``needs.input`` is False.
        kept: Y [b, l, N], any strides, and what :func:`project` and ``operators.scaled_weight``
            returned; what is None and needed is recomputed.
        operands: As in the forward.
        options: As in the forward.
        needs: Which gradients to compute.
        channel_first: Return dX as contiguous [b, K, l] instead of contiguous [b, l, K].
        into: Add dX to this tensor, in the layout asked for, and return it as dX.
    """
    if options.impl == "plain":
        if needs.x:
            operands, _ = _unpacked(operands, options)
        return _plain_backward(dy, x, operands, needs, channel_first, into)
    if not _in_fp8(options):
        operands, options = _unpacked(operands, options)
    if x is None:
        b, l, k = *dy.shape[:-1], operands.weight.shape[1]
        x = dy.new_empty(b, k, l).mT if channel_first else dy.new_empty(b, l, k)
    if options.impl == "triton":
        gradients = _triton_backward(dy, x, kept, operands, options, needs)
    else:
        h = kept.h
        if needs.lora_b and h is None:
            h = torch_forward(x, operands, options)[1]
        gradients = torch_backward(dy, x, operands, h, options, needs)
    dx = gradients.x
    if dx is None:
        return gradients
    if into is not None:
        dx = into.add_(dx.mT if channel_first else dx)
    elif channel_first:
        dx = dx.mT if dx.mT.is_contiguous() else transposed(dx)
    else:
        dx = dx if dx.is_contiguous() else transposed(dx.mT)
    return gradients._replace(x=dx)


def _sequences(x: Tensor) -> Tensor:
    """[..., features] -> [b, l, features]; three dimensions keep their strides."""
    return x if x.ndim == 3 else x.reshape(1, x.shape[:-1].numel(), x.shape[-1])


def _unpacked(operands: Operands, options: ProjectionOptions) -> tuple[Operands, ProjectionOptions]:
    """Return operands with a dense weight, which the caller must not keep."""
    if options.packed is None:
        return operands, options
    weight = options.packed.dense(operands.weight.dtype)
    return operands._replace(weight=weight), options._replace(packed=None)


def _triton_backward(
    dy: Tensor,
    x: Tensor,
    kept: Kept,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """The operator's gradients; dX is [b, l, K], stored as the matrix of tokens that X is."""
    direct = takes_channel_first(options)
    gradient, matrix = token_matrix(dy, direct=direct), token_matrix(x, direct=direct)
    length = gradient.shape[2] if gradient.ndim == 3 else 0
    lora = operands.lora_a is not None
    small = direct and not length and is_small(matrix, operands)
    # Whose gradients need neither Y nor H.
    wide = small or not takes_output(operands, options)
    given, h = kept.y, None if small else kept.h
    y = None
    if needs.scale and given is not None and not wide:
        # One walk over the tokens reads dY and Y, so they share a layout.
        y = token_matrix(given, direct=direct)
        if y.ndim != gradient.ndim:
            y = given.mT.contiguous() if length else given.reshape(-1, given.shape[-1])
    missing = (needs.scale and given is None) or (
        lora and (needs.scale or needs.lora_b) and h is None
    )
    if missing and not wide:
        fresh, h = forward(matrix, operands, options, length)
        y = fresh if needs.scale and given is None else y
    gradients = backward(
        gradient, matrix, operands, Kept(y, h if lora else None, kept.scaled), options, needs
    )
    dx = gradients.x
    if dx is not None:
        gradients = gradients._replace(x=dx.mT if matrix.ndim == 3 else dx.view(x.shape))
    return gradients


def _plain(x: Tensor, operands: Operands, channel_first: bool) -> Tensor:
    """``X Wᵀ + b``; batched rather than flattened where that spares a transposed copy."""
    weight, bias = operands.weight, operands.bias
    if not channel_first and x.is_contiguous():
        return F.linear(x, weight, bias)
    weights = weight.expand(x.shape[0], -1, -1)
    y = torch.bmm(weights, x.mT) if channel_first else torch.bmm(x, weights.mT)
    if bias is not None:
        y.add_(bias[:, None] if channel_first else bias)
    return y


def _plain_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``Σ dYᵀ X`` over [b, l, N] and [b, l, K]; channel-first tensors are not copied for it."""
    (_, l, n), k = dy.shape, x.shape[2]
    flat = dy.is_contiguous() and x.is_contiguous()
    # Sums of sequences in fp32, unless they would take more than the copies.
    if flat or 4 * n * k > dy.element_size() * l * (n + k):
        return torch.einsum("bln,blk->nk", dy, x)
    return wide_product(dy.mT, x).sum(0).to(dy.dtype)


def _plain_backward(
    dy: Tensor,
    x: Tensor | None,
    operands: Operands,
    needs: Needs,
    channel_first: bool = False,
    into: Tensor | None = None,
) -> Gradients:
    dx = dweight = None
    if needs.x:
        weights = operands.weight.expand(dy.shape[0], -1, -1)
        first, second = (weights.mT, dy.mT) if channel_first else (dy, weights)
        if into is not None:
            dx = into.baddbmm_(first, second)
        elif dy.is_contiguous() and not channel_first:
            dx = dy @ operands.weight
        else:
            dx = torch.bmm(first, second)
    if needs.weight and x is not None:
        dweight = _plain_weight_gradient(dy, x)
    dbias = dy.sum((0, 1)) if needs.bias else None
    return Gradients(x=dx, weight=dweight, bias=dbias)
