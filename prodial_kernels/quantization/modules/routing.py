"""Products of tokens with the experts that they are routed to, from stored weights.

Rows of a batch are sorted by expert. Of the experts that have rows, a few at a time are dequantised
into a buffer that lives for their products: neither all experts nor one without a row are ever
made dense. Backward does so again; it keeps none of the inputs, because the weights are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUP_BYTES = 2**27
"""Of the experts that are dense at one time, unless one alone is larger."""


class Stack(Protocol):
    """Weights [count, out_features, in_features], each stored by itself."""

    out_features: int
    in_features: int

    def prefetch(self, known: list[int]) -> None:
        """Begin to bring some weights to the device, where they are not there."""

    def unpack_some(self, ids: Tensor, known: list[int], out: Tensor) -> Tensor:
        """Dequantise those of ``ids``, which on the host are ``known``, to ``out`` [g, N, K]."""


@dataclass(frozen=True)
class Group:
    """Experts next to each other in the order of the rows.

    Attributes:
        ids: [g] int64, on the device; ``known`` is the same on the host.
        known: Their numbers.
        rows: Where their rows are.
        ends: Where each one's rows end, counted from the first of ``rows``.
        offsets: The same on the device, int32.
    """

    ids: Tensor
    known: list[int]
    rows: slice
    ends: list[int]
    offsets: Tensor


class Routes:
    """Which expert takes which rows; read once from the device.

    Attributes:
        order: [S] int64: a row's place among the S = M · k choices of the M tokens.
        places: [M, k] int64: the row of a token's choice.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        """Sort the choices, [M, k] int64 below ``experts``."""
        flat = chosen.reshape(-1)
        known, self.order = torch.sort(flat, stable=True)
        self.places = torch.empty_like(self.order)
        self.places[self.order] = torch.arange(len(flat), device=flat.device)
        self.places = self.places.view(chosen.shape)
        edges = torch.searchsorted(known, torch.arange(experts + 1, device=flat.device))
        counts = edges.diff()
        # Those that have rows first, in order; nothing waits for the device but the next line.
        self._ids = torch.argsort(counts.eq(0).to(torch.int32), stable=True)
        self._ends = counts[self._ids].cumsum(0)
        every = counts.tolist()
        self._known = [expert for expert, count in enumerate(every) if count]
        self._counts = [every[expert] for expert in self._known]

    @property
    def used(self) -> int:
        """How many experts have rows."""
        return len(self._known)

    def groups(self, most: int) -> Iterator[Group]:
        """Yield the experts that have rows, at most so many at a time."""
        start = 0
        for first in range(0, len(self._known), max(1, most)):
            known = self._known[first : first + most]
            ends, total = [], 0
            for count in self._counts[first : first + most]:
                total += count
                ends.append(total)
            part = slice(first, first + len(known))
            yield Group(
                self._ids[part], known, slice(start, start + total), ends,
                (self._ends[part] - start).to(torch.int32),
            )  # fmt: skip
            start += total


def dispatch(hidden: Tensor, routes: Routes) -> Tensor:
    """[M, d] -> the rows [S, d] that the experts take, one expert's after the other's."""
    rows: Tensor = _Dispatch.apply(hidden, routes)
    return rows


def routed_linear(rows: Tensor, stack: Stack, routes: Routes) -> Tensor:
    """Multiply each row by its expert's weight: [S, in_features] -> [S, out_features]."""
    product: Tensor = _RoutedLinear.apply(rows, stack, routes)
    return product


def combine(rows: Tensor, weights: Tensor, routes: Routes) -> Tensor:
    """Add a token's choices: Σ weights[m, j] · rows[places[m, j]], [S, d] -> [M, d].

    In fp32, in a fixed order; rounded once to the dtype of ``rows``. ``weights`` is [M, k].
    """
    tokens: Tensor = _Combine.apply(rows, weights, routes)
    return tokens


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return hidden[routes.order.div(routes.places.shape[1], rounding_mode="floor")]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places = ctx.routes.places
        total = grad.new_zeros(len(places), grad.shape[1], dtype=_wide(grad))
        for place in places.unbind(1):
            total.add_(grad[place])
        return total.to(grad.dtype), None


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Stack, routes: Routes) -> Tensor:
        ctx.stack, ctx.routes = stack, routes
        return _products(rows, stack, routes, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _products(grad.contiguous(), ctx.stack, ctx.routes, backward=True), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        ctx.save_for_backward(rows, weights)
        wide = _wide(rows)
        total = rows.new_zeros(len(weights), rows.shape[1], dtype=wide)
        for place, weight in zip(routes.places.unbind(1), weights.to(wide).unbind(1), strict=True):
            total.addcmul_(rows[place].to(wide), weight[:, None])
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        wide = _wide(rows)
        grad = grad.to(wide)
        towards_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        towards_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        for index, place in enumerate(ctx.routes.places.unbind(1)):
            if towards_rows is not None:
                towards_rows[place] = (grad * weights[:, index, None]).to(rows.dtype)
            if towards_weights is not None:
                towards_weights[:, index] = (grad * rows[place]).sum(1)
        return towards_rows, towards_weights, None


def _products(rows: Tensor, stack: Stack, routes: Routes, *, backward: bool) -> Tensor:
    """``rows @ Wᵀ`` by expert, or ``rows @ W``."""
    n, k = stack.out_features, stack.in_features
    result = rows.new_empty(len(rows), k if backward else n)
    most = min(routes.used, max(1, GROUP_BYTES // (n * k * rows.itemsize)))
    room = rows.new_empty(most, n, k)
    groups = list(routes.groups(most))
    for index, group in enumerate(groups):
        if index == 0:
            stack.prefetch(group.known)
        if index + 1 < len(groups):
            # Beside the products of this one.
            stack.prefetch(groups[index + 1].known)
        weights = stack.unpack_some(group.ids, group.known, room[: len(group.known)])
        weights = weights if backward else weights.mT
        part, out = rows[group.rows], result[group.rows]
        if _takes_grouped_product(rows, n, k):
            out.copy_(F.grouped_mm(part, weights, offs=group.offsets))
            continue
        start = 0
        for place, end in enumerate(group.ends):
            torch.mm(part[start:end], weights[place], out=out[start:end])
            start = end
    return result


def _takes_grouped_product(rows: Tensor, n: int, k: int) -> bool:
    """Whether PyTorch's product of groups takes these: on CUDA, with strides of 16 bytes."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and n % 8 == 0
        and k % 8 == 0
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
