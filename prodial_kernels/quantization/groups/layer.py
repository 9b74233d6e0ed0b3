"""A frozen weight of integer codes with a scale and a zero point for each group of its columns.

``W[n, k] = (code[n, k] − zero[n, g]) · scale[n, g]``, where g is the group that column k is of.
GPTQ, AWQ, HQQ and the integer formats of compressed-tensors are all this, and are repacked into it
(:mod:`.layouts`): codes in rows, in 2, 4 or 8 bits each.

Those libraries compute in the dtype of the scales; so a zero point that is no integer (HQQ's) is
subtracted with one rounding to it, as there. The product is rounded once, to what is asked for:
where that is the dtype of the scales, W is the library's own weight bit for bit, elsewhere it is
nearer to what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from prodial_kernels.quantization.groups.rounding import rounded
from prodial_kernels.quantization.groups.words import WIDTHS, pack, unpack, width_of
from prodial_kernels.quantization.int8 import row_chunks
from prodial_kernels.quantization.layer import QuantizedLinear, check_scales

_SCALES, _ZEROS = "weight_group_scales", "weight_group_zeros"
_ORDER, _LAYOUT = "weight_group_order", "weight_group_layout"
ENTRIES = ("weight", _SCALES, _ZEROS, _ORDER, _LAYOUT)
"""What a state dict may hold of a layer; an empty tensor is as good as none."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_ZERO_DTYPES = (torch.uint8, torch.int16, *_FLOATS)
GROUP = 128
"""Columns of a group where nobody says."""


class GroupedLinear(QuantizedLinear):
    """A layer whose weight [N, K] is stored by groups.

    Buffers: ``codes`` [N, ⌈K · width / 8⌉] uint8, the first column in the lowest bits; ``scales``
    [R, S]; ``zeros`` [R, S] in integers or floating point, or None where all are ``zero``;
    ``order`` [K] int32, the group of each column, or None where a group has ``columns`` columns in
    a row. Row n has the scales of row n mod R, for groups that run down the rows.
    """

    FORMAT: ClassVar[str] = "groups"
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        zero: int = 0,
        order: Tensor | None = None,
        columns: int,
        bits: int,
    ) -> None:
        """Hold the stored tensors; ``bits`` of a code are stored in the next of 2, 4 or 8."""
        super().__init__(in_features, out_features, bias, dtype)
        self.bits = bits
        self.columns = columns
        self.zero = zero
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @property
    def width(self) -> int:
        """Bits that a code is stored in."""
        return width_of(self.bits)

    @classmethod
    @torch.no_grad()
    def quantize(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        bits: int = 4,
        columns: int = GROUP,
        symmetric: bool = False,
    ) -> GroupedLinear:
        """Round to the nearest of ``2^bits`` even steps between a group's extremes, and zero.

        Args:
            weight: See the base class.
            bias: Likewise.
            bits: Of a code.
            columns: Of a group; the last one may have fewer.
            symmetric: Whether zero is the middle of every group.
        """
        n, k = weight.shape
        scale_dtype = weight.dtype if weight.dtype in _FLOATS else torch.float32
        scales = torch.zeros(n, -(-k // columns), dtype=scale_dtype, device=weight.device)
        like = cls(
            k, n, bias, weight.dtype, codes=scales, scales=scales, zero=1 << (bits - 1),
            zeros=None if symmetric else scales.to(torch.uint8), columns=columns, bits=bits,
        )  # fmt: skip
        return like.rounded(weight, keep=False)

    @torch.no_grad()
    def rounded(self, weight: Tensor, *, keep: bool = True) -> GroupedLinear:
        """See the base class: of each group, with the scales that make the smaller error.

        ``keep``: whether this layer's scales are among those that are tried.
        """
        codes, scales, zeros = rounded(self, weight, keep=keep)
        return GroupedLinear(
            self.in_features, self.out_features, self.bias, self.dtype,
            codes=pack(codes, self.width), scales=scales, zeros=zeros, zero=self.zero,
            order=self.order, columns=self.columns, bits=self.bits,
        )  # fmt: skip

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype | None
    ) -> GroupedLinear:
        """See the base class; ``dtype`` defaults to that of the scales."""
        codes, scales, layout = entries["weight"], entries[_SCALES], entries[_LAYOUT].tolist()
        check_scales(_SCALES, scales)
        zeros, order = (
            each if (each := entries.get(name)) is not None and each.numel() else None
            for name in (_ZEROS, _ORDER)
        )
        if len(layout) != 4 or min(layout[:3]) < 1 or layout[0] > WIDTHS[-1]:
            raise ValueError(
                f"{_LAYOUT} must be bits (1 to 8), in_features, columns of a group and a zero "
                f"point, got {layout}"
            )
        bits, k, columns, zero = layout
        fits = (
            codes.dtype == torch.uint8
            and codes.ndim == scales.ndim == 2
            and codes.shape[1] == -(-k * width_of(bits) // 8)
            and 0 < len(scales) <= len(codes)
            and len(codes) % len(scales) == 0
            and scales.dtype in _FLOATS
            and (order is not None or scales.shape[1] == -(-k // columns))
        )
        if not fits:
            raise ValueError(
                f"expected weight [out_features, {-(-k * width_of(bits) // 8)}] uint8 and "
                f"{_SCALES} [out_features, {-(-k // columns)}] in 16 or 32 bits for {bits} bits "
                f"and groups of {columns} of {k} columns, got weight {list(codes.shape)} "
                f"{codes.dtype} and {_SCALES} {list(scales.shape)} {scales.dtype}"
            )
        if zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in _ZERO_DTYPES):
            raise ValueError(
                f"{_ZEROS} must be as {_SCALES} {list(scales.shape)}, in uint8, int16 or floating "
                f"point, got {list(zeros.shape)} {zeros.dtype}"
            )
        if zeros is not None and zeros.is_floating_point():
            check_scales(_ZEROS, zeros)
        if order is not None:
            known = [*order.shape] == [k] and order.dtype == torch.int32
            if not known or (k and not 0 <= int(order.min()) <= int(order.max()) < scales.shape[1]):
                raise ValueError(
                    f"{_ORDER} must hold the group of each of {k} columns, of {scales.shape[1]} "
                    f"groups, in int32, got {list(order.shape)} {order.dtype}"
                )
        return cls(
            k, len(codes), bias, scales.dtype if dtype is None else dtype, bits=bits,
            columns=columns, zero=zero, codes=codes.contiguous(), scales=scales.contiguous(),
            zeros=None if zeros is None else zeros.contiguous(), order=order,
        )  # fmt: skip

    def entries(self) -> dict[str, Tensor]:
        """The codes as ``weight``, and what belongs to a group or to all."""
        layout = [self.bits, self.in_features, self.columns, self.zero]
        entries = {"weight": self.codes, _SCALES: self.scales, _LAYOUT: torch.tensor(layout)}
        for name, tensor in ((_ZEROS, self.zeros), (_ORDER, self.order)):
            if tensor is not None:
                entries[name] = tensor
        return entries

    def write(self, packed: tuple[Tensor, ...], out: Tensor) -> None:
        """See the base class."""
        codes, scales, *_ = packed
        at = torch.arange(len(codes), device=codes.device) % len(scales)
        for rows in row_chunks(out):
            out[rows] = self._weights(packed, codes[rows], at[rows])

    def gather(self, packed: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """See the base class."""
        codes, scales, *_ = packed
        return self._weights(packed, codes[rows], rows % len(scales)).to(dtype)

    def _weights(self, packed: tuple[Tensor, ...], codes: Tensor, at: Tensor) -> Tensor:
        """The values [m, K] fp32 of rows of codes whose scales are the rows ``at``."""
        _, scales, zeros, order = self._named(packed)
        k = self.in_features
        values = unpack(codes, self.width, k).float()
        if zeros is None:
            values -= self.zero
        else:
            values -= self._spread(zeros[at], order).float()
            if zeros.is_floating_point():
                values = values.to(scales.dtype).float()
        return values.mul_(self._spread(scales[at], order).float())

    def _spread(self, of_groups: Tensor, order: Tensor | None) -> Tensor:
        """A value per group -> a value per column."""
        if order is not None:
            return of_groups[:, order.long()]
        return of_groups.repeat_interleave(self.columns, 1)[:, : self.in_features]

    def _named(
        self, packed: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What :meth:`packed` gives, with None for what this layer has not."""
        codes, scales, *rest = packed
        zeros = rest.pop(0) if self.zeros is not None else None
        return codes, scales, zeros, rest.pop(0) if self.order is not None else None

    @property
    def row_multiple(self) -> int:
        """See the base class: a group within a row, or the rows after which scales repeat."""
        return 1 if len(self.scales) in (1, self.out_features) else len(self.scales)

    def cut(self, packed: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """See the base class."""
        codes, scales, zeros, order = self._named(packed)
        own = slice(start, stop) if len(scales) == len(codes) else slice(None)
        parts = (codes[start:stop], scales[own], None if zeros is None else zeros[own], order)
        return tuple(part for part in parts if part is not None)

    def launch(self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """See the base class."""
        from prodial_kernels.kernels.dequantize_groups import dequantize_groups

        codes, scales, zeros, order = self._named(packed)
        return dequantize_groups(
            codes, scales, zeros, order, out, dtype=dtype, k=self.in_features, width=self.width,
            columns=self.columns, zero=self.zero,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Also what a code and a group are."""
        group = "by order" if self.order is not None else self.columns
        return f"{super().extra_repr()}, bits={self.bits}, group={group}"

    def _take(self, other: QuantizedLinear) -> None:
        super()._take(other)
        if isinstance(other, GroupedLinear):
            self.bits, self.columns, self.zero = other.bits, other.columns, other.zero


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] uint8 as a :class:`GroupedLinear` stores them."""
    return pack(codes, width_of(bits))
