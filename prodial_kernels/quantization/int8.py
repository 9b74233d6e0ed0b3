"""int8, symmetric per output channel, in the layout of LLM.int8 (bitsandbytes' ``Linear8bitLt``).

``weight`` is CB [N, K] int8, ``SCB`` [N] fp32 the rows' largest magnitudes: W = CB · SCB / 127.
Chosen over torchao's int8 because its state dict is plain tensors, which safetensors stores. What
torchao stored is read with its own scales, ``weight_scale_rows`` [N] fp32: W = weight · scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from prodial_kernels.quantization.layer import CHUNK, QuantizedLinear, check_scales

# The fp32 number that bitsandbytes multiplies by.
_STEP = 7.874015718698502e-3
_OWN_SCALES = "weight_scale_rows"

NEGLIGIBLE = 1e-30
"""A row or tile without a larger magnitude is stored as zeros: its scale would overflow fp32."""


class Int8Linear(QuantizedLinear):
    """Buffers: ``codes`` [N, K] int8 and ``SCB`` [N] fp32; W = (codes · SCB) · step."""

    FORMAT: ClassVar[str] = "int8"
    codes: Tensor
    SCB: Tensor

    def __init__(
        self,
        codes: Tensor,
        scb: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        step: float = _STEP,
    ) -> None:
        """Hold the stored tensors; ``step`` is 1 where ``scb`` holds the scales themselves."""
        super().__init__(codes.shape[1], codes.shape[0], bias, dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("SCB", scb)
        self.step = step

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Quantise as bitsandbytes' ``int8_vectorwise_quant`` does; see the base class."""
        scb = weight.abs().amax(1).float()
        factor = torch.where(scb > NEGLIGIBLE, 127.0 / scb, 0.0)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows in row_chunks(weight):
            codes[rows] = (weight[rows] * factor[rows, None]).round_().to(torch.int8)
        return cls(codes, scb, bias, weight.dtype)

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Int8Linear:
        """See the base class; one scale for all rows stays one."""
        largest = weight.abs().amax(1).float()
        if len(self.SCB) > 1 and bool((self.SCB[0] == self.SCB).all()):
            largest = largest.amax().expand_as(largest)
        fresh = torch.where(largest > NEGLIGIBLE, largest / 127 / self.step, 1.0)
        scb = fitting_scales(self.SCB, fresh, 1.0 + 1 / 254, 0.5)
        codes = torch.empty_like(self.codes)
        for rows in row_chunks(weight):
            exact = weight[rows].float() / (scb[rows, None] * self.step)
            codes[rows] = exact.round_().clamp_(-127, 127).to(torch.int8)
        return Int8Linear(codes, scb, self.bias, weight.dtype, self.step)

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype | None
    ) -> Int8Linear:
        """See the base class; ``dtype`` defaults to float16, which LLM.int8 is made for."""
        name = _OWN_SCALES if _OWN_SCALES in entries else "SCB"
        check_scales(name, entries[name])
        codes, scb = entries["weight"].contiguous(), entries[name].float()
        if codes.dtype != torch.int8 or codes.ndim != 2 or scb.shape != codes.shape[:1]:
            raise ValueError(
                f"expected weight [out_features, in_features] int8 and {name} [out_features], got "
                f"weight {list(codes.shape)} {codes.dtype} and {name} {list(scb.shape)}"
            )
        layout = entries.get("weight_format")
        if layout is not None and layout.tolist() not in (0, [0]):
            raise ValueError(
                f"weight_format must be 0 (rows), got {layout.tolist()}, a layout of bitsandbytes' "
                "older GPU kernels; save the checkpoint again with bitsandbytes 0.45 or later"
            )
        step = _STEP if name == "SCB" else 1.0
        return cls(codes, scb, bias, torch.float16 if dtype is None else dtype, step)

    def entries(self) -> dict[str, Tensor]:
        """The entries of ``Linear8bitLt`` but for the bias, or the two of torchao's numbers."""
        if self.step == 1.0:
            return {"weight": self.codes, _OWN_SCALES: self.SCB}
        rows = torch.tensor(0, dtype=torch.uint8)
        return {"weight": self.codes, "SCB": self.SCB, "weight_format": rows}

    def write(self, packed: tuple[Tensor, ...], out: Tensor) -> None:
        """See the base class."""
        codes, scb = packed
        for rows in row_chunks(codes):
            torch.mul(codes[rows] * scb[rows, None], self.step, out=out[rows])

    def gather(self, packed: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """See the base class."""
        codes, scb = packed
        return (codes[rows] * scb[rows, None]).mul_(self.step).to(dtype)

    @property
    def row_multiple(self) -> int:
        """See the base class: a scale a row."""
        return 1

    def cut(self, packed: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """See the base class."""
        codes, scb = packed
        return codes[start:stop], scb[start:stop]

    def launch(self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """See the base class."""
        from prodial_kernels.kernels.dequantize import dequantize_int8

        codes, scb = packed
        return dequantize_int8(codes, scb, out, dtype=dtype, step=self.step)

    def _take(self, other: QuantizedLinear) -> None:
        super()._take(other)
        if isinstance(other, Int8Linear):
            self.step = other.step


def row_chunks(matrix: Tensor, multiple: int = 1) -> list[slice]:
    """Slices of rows with at most ``CHUNK`` elements where a ``multiple`` of rows allows it."""
    rows = max(1, CHUNK // max(1, matrix.shape[1]) // multiple) * multiple
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def fitting_scales(stored: Tensor, fresh: Tensor, most: float, least: float) -> Tensor:
    """Choose between scales that are there and new ones that values just fit.

    Args:
        stored: The scales that are there, fp32.
        fresh: The new ones; kept are those of ``stored`` that are at least ``fresh / most`` and at
            most ``fresh / least``.
        most: See ``fresh``.
        least: Likewise.

    Returns:
        Scales that have the dtype in which ``stored`` are exact: bf16, fp16, or bare exponents.
    """
    if not (stored.contiguous().view(torch.int32) & 0x7FFFFF).any():
        fresh = torch.exp2(torch.log2(fresh).ceil())
    else:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(stored.to(dtype).float(), stored):
                fresh = fresh.to(dtype).float()
                break
    keep = (fresh <= stored * most) & (fresh >= stored * least)
    return torch.where(keep, stored, fresh)
