"""Rounding to fp8 by token and 128 columns: the definition, in plain PyTorch.

A group of 128 columns of a row shares a scale, the least power of two over which its largest
magnitude is 448 or less, the largest of e4m3. Powers of two lose nothing in a format that has
exponents, and every rounded value is exact in 16 bits too: it has four significant ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUP = 128
"""Columns that share a scale, and a side of the stored weight's tiles."""


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., K] float8_e4m3fn and scales [..., ⌈K / 128⌉] fp32 of X [..., K].

    The scale of a group that is not finite is NaN, and so is then every value of it. In fp32,
    whatever the dtype of X, and bit for bit what the kernels make.
    """
    k = x.shape[-1]
    wide = F.pad(x.float(), (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    bits = (wide.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1)
    # One exponent more where the mantissa is above that of 448.
    exponent = ((bits.clamp(max=0x7F7FFFFF) + 0x1FFFFF) >> 23).clamp(min=9)
    scale = ((exponent - 8) << 23).view(torch.float32)
    inverse = ((262 - exponent) << 23).view(torch.float32)
    codes = (wide * inverse[..., None]).flatten(-2)[..., :k].to(torch.float8_e4m3fn)
    return codes, scale.masked_fill(bits >= 0x7F800000, float("nan"))


def rounded(x: Tensor) -> Tensor:
    """Return X [..., K] rounded to fp8, in its own dtype."""
    codes, scale = round_to_fp8(x)
    spread = scale.repeat_interleave(GROUP, -1)[..., : x.shape[-1]]
    return (codes.float() * spread).to(x.dtype)


def fp8_product(u: Tensor, weight: Tensor) -> Tensor:
    """``U Wᵀ`` with U [..., K] rounded to fp8 and, in backward, the gradient towards the product.

    The roundings count as the identity (straight through). W [N, K] gets no gradient.
    """
    product: Tensor = _Fp8Product.apply(u, weight)
    return product


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return rounded(u) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return rounded(grad_output) @ weight, None
