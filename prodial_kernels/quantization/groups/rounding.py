"""Rounding a dense weight to codes, in the groups and dtypes that a stored one has."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prodial_kernels.quantization.int8 import NEGLIGIBLE

# Shares of a group's range that are tried: of a few outliers, the far ends cost the rest precision.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)


class Groups(Protocol):
    """What a :class:`~prodial_kernels.quantization.groups.layer.GroupedLinear` says of itself."""

    in_features: int
    bits: int
    columns: int
    zero: int
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None


@torch.no_grad()
def rounded(
    like: Groups, weight: Tensor, *, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round ``weight`` [N, K] to the nearest codes in the groups of ``like``.

    Of each group, the scale and zero point are those of ``like`` or of a range of the group's own
    values, whichever makes the smaller squared error; so a weight that ``like`` holds comes out in
    its very codes. Bits, groups, their order and all dtypes are kept.

    Args:
        like: On the device of ``weight``.
        weight: Finite, in 16 or 32 bits.
        keep: Whether the scales and zero points of ``like`` are among those that are tried.

    Returns:
        Codes [N, K] uint8, scales, and zero points or None.
    """
    n, k = weight.shape
    repeats = len(like.scales)
    members = _members(like, weight.device)
    most = (1 << like.bits) - 1
    # [R, S, values of a group], and which of them are there.
    values = _by_groups(weight.float(), members, repeats)
    there = (members >= 0).repeat(1, n // repeats)[None]
    values = torch.where(there, values, 0.0)
    best = _Best(like, values, there, most)
    if keep:
        zeros = like.zeros
        same = torch.full_like(like.scales, like.zero) if zeros is None else zeros
        best.offer(like.scales.float(), same.float())
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    for share in _SHARES:
        if like.zeros is None:
            scale = torch.maximum(-low, high) * share * (2 / most)
            zero = torch.full_like(scale, like.zero)
        else:
            scale = (high - low) * share / most
            zero = -low * share / scale.clamp(min=NEGLIGIBLE)
            if not like.zeros.is_floating_point():
                # Not 0, which GPTQ's first version, storing them less one, cannot hold.
                zero = zero.round().clamp(1, most)
        best.offer(torch.where(scale > NEGLIGIBLE, scale, 1.0), zero)
    return _by_rows(best.codes, members, n, k), best.scales, best.zeros


class _Best:
    """The scales and codes with the smallest error so far, by groups."""

    def __init__(self, like: Groups, values: Tensor, there: Tensor, most: int) -> None:
        self._like, self._values, self._there, self._most = like, values, there, most
        shape = values.shape[:2]
        self.scales = torch.ones(shape, dtype=like.scales.dtype, device=values.device)
        self.zeros = (
            None
            if like.zeros is None
            else torch.zeros(shape, dtype=like.zeros.dtype, device=values.device)
        )
        self.codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        self._errors = torch.full(shape, torch.inf, device=values.device)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take the groups whose error becomes smaller with these, rounded as they are stored."""
        stored = scale.to(self.scales.dtype)
        exact = stored.float()
        if self.zeros is not None:
            zero = zero.to(self.zeros.dtype).float()
        codes = self._values / torch.where(exact.abs() > 0, exact, 1.0)[..., None]
        codes = codes.add_(zero[..., None]).round_().clamp_(0, self._most)
        made = codes - zero[..., None]
        if self.zeros is not None and self.zeros.is_floating_point():
            made = made.to(stored.dtype).float()
        wrong = made.mul_(exact[..., None]).sub_(self._values)
        errors = torch.where(self._there, wrong, 0.0).square_().sum(-1)
        better = errors < self._errors
        self._errors = torch.where(better, errors, self._errors)
        self.scales = torch.where(better, stored, self.scales)
        if self.zeros is not None:
            self.zeros = torch.where(better, zero.to(self.zeros.dtype), self.zeros)
        self.codes = torch.where(better[..., None], codes.to(torch.uint8), self.codes)


def _members(like: Groups, device: torch.device) -> Tensor:
    """The columns of each group [S, most], −1 where a group has fewer."""
    k, groups = like.in_features, like.scales.shape[1]
    if like.order is None:
        columns = torch.arange(groups * like.columns, device=device).view(groups, like.columns)
        return torch.where(columns < k, columns, -1)
    order = like.order.to(device).long()
    counts = torch.bincount(order, minlength=groups)
    members = torch.full((groups, int(counts.max())), -1, device=device)
    columns = torch.argsort(order, stable=True)
    starts = counts.cumsum(0) - counts
    members[order[columns], torch.arange(k, device=device) - starts[order[columns]]] = columns
    return members


def _by_groups(weight: Tensor, members: Tensor, repeats: int) -> Tensor:
    """[N, K] -> [R, S, N / R · most], the values that share a scale."""
    n = len(weight)
    # Row n of the scales' row n mod R.
    split = weight.view(n // repeats, repeats, -1)[:, :, members.clamp(min=0)]
    return split.permute(1, 2, 0, 3).flatten(2)


def _by_rows(codes: Tensor, members: Tensor, n: int, k: int) -> Tensor:
    """The inverse for codes: [R, S, N / R · most] uint8 -> [N, K]."""
    repeats, groups, _ = codes.shape
    split = codes.view(repeats, groups, n // repeats, -1).permute(2, 0, 1, 3)
    split = split.reshape(n, groups * members.shape[1])
    flat = members.reshape(-1)
    rows = torch.zeros(n, k, dtype=torch.uint8, device=codes.device)
    rows[:, flat[flat >= 0]] = split[:, flat >= 0]
    return rows
