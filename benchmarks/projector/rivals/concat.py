"""The strongest form on cuBLAS that we know: ``Y = [X D_bᵀ | X Aᵀ] [s ⊙ W | α B]ᵀ``.

One product forward and one backward at the inner dimension K + r, the scale's gradient from Y,
reductions fused by torch.compile. It holds one more matrix of the size of W while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.projector.rivals.layer import Layer, leaves
from benchmarks.projector.rivals.methods import ADAPTER
from benchmarks.projector.rivals.plain import compile_for
from prodial_kernels.ops.diagonal import deviation, deviation_backward
from prodial_kernels.testing import LinearCase


def concat(case: LinearCase) -> Layer:
    """Prepare the layer; the reductions are compiled once for each shape."""
    trained = leaves(case, *ADAPTER)
    compiled = compile_for(case.x.device)
    reductions = (compiled(scale_sums), compiled(diagonal_side))
    return Layer(
        lambda x: ConcatLinear.apply(
            x, case.weight, *trained.values(), case.lora_scaling, reductions
        ),
        trained,
    )


def scale_sums(dy: Tensor, y: Tensor, b: Tensor, db: Tensor, scale: Tensor) -> Tensor:
    """``ds = [colsum(dY ⊙ Y) − rowsum(dB ⊙ B)] / s``, one read of dY and Y."""
    return ((dy.float() * y.float()).sum(0) - (db * b).sum(1)) / scale


def diagonal_side(du: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """For P = 1: ``dU ⊙ d`` and ``colsum(dU ⊙ X)``, one read of each."""
    return (du * d).to(x.dtype), (du.float() * x.float()).sum(0)


class ConcatLinear(torch.autograd.Function):
    """Keeps X, Y and H."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        blocks: Tensor,
        scale: Tensor,
        a: Tensor,
        b: Tensor,
        alpha: float,
        reductions: tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]],
    ) -> Tensor:
        """X [M, K] -> Y [M, N]."""
        k, p = x.shape[1], blocks.shape[1]
        side = x.new_empty(x.shape[0], k + a.shape[0])
        d = rotation(blocks)
        if p == 1:
            torch.mul(x, d.flatten(), out=side[:, :k])
        else:
            torch.bmm(by_block(x, p), d.to(x.dtype).mT, out=by_block(side[:, :k], p))
        torch.mm(x, a.T.to(x.dtype), out=side[:, k:])
        y = side @ joined_weight(w, scale, b, alpha).T
        # A copy, since a view would keep all of ``side``.
        ctx.save_for_backward(x, w, blocks, scale, a, b, y, side[:, k:].clone())
        ctx.alpha, ctx.reductions = alpha, reductions
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Every gradient of the adapter, and dX."""
        x, w, blocks, scale, a, b, y, h = ctx.saved_tensors
        scale_sums, diagonal_side = ctx.reductions
        k, p = x.shape[1], blocks.shape[1]
        db = ctx.alpha * (dy.T @ h).float()
        # Y comes back with its graph, which the compiler would look into.
        dscale = scale_sums(dy, y.detach(), b, db, scale)
        joined = dy @ joined_weight(w, scale, b, ctx.alpha)
        du, t = joined[:, :k], joined[:, k:]
        d = rotation(blocks)
        if p == 1:
            dx, rotated = diagonal_side(du, x, d.flatten())
            rotated = rotated.view_as(blocks)
        else:
            rotated = torch.bmm(by_block(du, p).mT, by_block(x, p)).float()
            dx = torch.empty_like(x)
            torch.bmm(by_block(du, p), d.to(x.dtype), out=by_block(dx, p))
        dx.addmm_(t, a.to(x.dtype))
        dblocks = deviation_backward(rotated, blocks, "relu")
        return dx, None, dblocks, dscale, (t.T @ x).float(), db, None, None


def joined_weight(w: Tensor, scale: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``[s ⊙ W | α B]``, [N, K + r]."""
    k = w.shape[1]
    joined = w.new_empty(w.shape[0], k + b.shape[1])
    torch.mul(w, scale[:, None], out=joined[:, :k])
    torch.mul(b, alpha, out=joined[:, k:])
    return joined


def rotation(blocks: Tensor) -> Tensor:
    """D_b, [K / P, P, P], fp32."""
    eye = torch.eye(blocks.shape[1], device=blocks.device, dtype=blocks.dtype)
    return deviation(blocks, "relu") + eye


def by_block(matrix: Tensor, p: int) -> Tensor:
    """[M, K] -> a view [K / P, M, P]."""
    return matrix.unflatten(1, (-1, p)).transpose(0, 1)
