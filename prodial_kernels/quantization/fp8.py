"""fp8 e4m3 with one fp32 scale for every 128×128 tile, as DeepSeek-V3's checkpoints store it.

``weight`` is [N, K] float8_e4m3fn, ``weight_scale_inv`` [⌈N / 128⌉, ⌈K / 128⌉] fp32 what a tile is
multiplied by. transformers' ``FP8Linear`` and vLLM read the same tensors; tiles at the edges may
be smaller. Scales may be powers of two, stored as their exponents (E8M0, one byte each). What
torchao stored with a scale per row is read as [N, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prodial_kernels.quantization.int8 import NEGLIGIBLE, fitting_scales, row_chunks
from prodial_kernels.quantization.layer import QuantizedLinear, check_scales

TILE = 128
_LARGEST = 448.0


class FP8Linear(QuantizedLinear):
    """Buffers: ``codes`` [N, K] float8_e4m3fn and ``weight_scale_inv`` fp32, by tiles or rows."""

    FORMAT: ClassVar[str] = "fp8"
    codes: Tensor
    weight_scale_inv: Tensor

    def __init__(
        self, codes: Tensor, scale_inv: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Hold the stored tensors."""
        super().__init__(codes.shape[1], codes.shape[0], bias, dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("weight_scale_inv", scale_inv)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, bias: Tensor | None) -> FP8Linear:
        """Scale each tile's largest magnitude to 448, e4m3's; see the base class."""
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scales = []
        for rows in row_chunks(weight, TILE):
            part = weight[rows].float()
            largest = F.max_pool2d(part.abs()[None], TILE, ceil_mode=True)[0]
            scale = torch.where(largest > NEGLIGIBLE, _LARGEST / largest, 1.0)
            codes[rows] = (part * _spread(scale, part)).to(torch.float8_e4m3fn)
            scales.append(1.0 / scale)
        return cls(codes, torch.cat(scales), bias, weight.dtype)

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> FP8Linear:
        """See the base class; one scale for the whole weight stays one."""
        stored = self.weight_scale_inv
        if self.by_rows:
            largest = weight.abs().amax(1, keepdim=True).float()
        else:
            parts = [weight[rows].abs().float()[None] for rows in row_chunks(weight, TILE)]
            largest = torch.cat([F.max_pool2d(p, TILE, ceil_mode=True)[0] for p in parts])
        if stored.numel() > 1 and bool((stored == stored.view(-1)[0]).all()):
            largest = largest.amax().expand_as(largest)
        fresh = torch.where(largest > NEGLIGIBLE, largest / _LARGEST, 1.0)
        # Where values are a little larger than the largest code, rounding is to it in any case.
        scales = fitting_scales(stored, fresh, 1.0 + 2**-6, 2**-4)
        codes = torch.empty_like(self.codes)
        for rows in row_chunks(weight, TILE):
            part = weight[rows].float()
            tiles = slice(rows.start // TILE, -(-rows.stop // TILE))
            own = scales[rows] if self.by_rows else _spread(scales[tiles], part)
            codes[rows] = (part / own).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return FP8Linear(codes, scales, self.bias, weight.dtype)

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype | None
    ) -> FP8Linear:
        """See the base class; ``dtype`` defaults to bfloat16, as in DeepSeek's code."""
        codes = entries["weight"].contiguous()
        scales = entries["weight_scale_inv"]
        if scales.dtype == torch.uint8:
            # Bytes beside e4m3 codes are exponents in every checkpoint that has them.
            scales = scales.view(torch.float8_e8m0fnu)
        check_scales("weight_scale_inv", scales)
        scale_inv = scales.float().contiguous()
        tiles = [-(-size // TILE) for size in codes.shape]
        shapes = (tiles, [*codes.shape[:1], 1])
        if (
            codes.dtype != torch.float8_e4m3fn
            or codes.ndim != 2
            or [*scale_inv.shape] not in shapes
        ):
            raise ValueError(
                "expected weight [out_features, in_features] float8_e4m3fn and weight_scale_inv "
                f"{tiles}, a scale per {TILE}×{TILE} tile, or one per row; got weight "
                f"{list(codes.shape)} {codes.dtype} and weight_scale_inv {list(scale_inv.shape)}"
            )
        # e4m3fn has NaN, and no infinity.
        if (codes.view(torch.uint8) & 0x7F == 0x7F).any():
            raise ValueError("weight is not finite; fetch the checkpoint again")
        return cls(codes, scale_inv, bias, torch.bfloat16 if dtype is None else dtype)

    @property
    def by_rows(self) -> bool:
        """Whether a scale belongs to a row, else to a tile."""
        tiles = [-(-size // TILE) for size in self.codes.shape]
        return [*self.weight_scale_inv.shape] != tiles

    def entries(self) -> dict[str, Tensor]:
        """The entries of DeepSeek's checkpoints but for the bias."""
        return {"weight": self.codes, "weight_scale_inv": self.weight_scale_inv}

    def write(self, packed: tuple[Tensor, ...], out: Tensor) -> None:
        """See the base class."""
        codes, scale_inv = packed
        for rows in row_chunks(codes, TILE):
            part = codes[rows].float()
            if [*scale_inv.shape] == [len(codes), 1]:
                torch.mul(part, scale_inv[rows], out=out[rows])
                continue
            tiles = slice(rows.start // TILE, -(-rows.stop // TILE))
            torch.mul(part, _spread(scale_inv[tiles], part), out=out[rows])

    def gather(self, packed: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """See the base class."""
        codes, scale_inv = packed
        # As bytes, because not every device indexes the type.
        values = codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn).float()
        if self.by_rows:
            return values.mul_(scale_inv[rows]).to(dtype)
        scales = scale_inv[rows.div(TILE, rounding_mode="floor")]
        return values.mul_(scales.repeat_interleave(TILE, 1)[:, : self.in_features]).to(dtype)

    @property
    def row_multiple(self) -> int:
        """See the base class: rows of a tile."""
        return 1 if self.by_rows else TILE

    def cut(self, packed: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """See the base class."""
        codes, scale_inv = packed
        if self.by_rows:
            return codes[start:stop], scale_inv[start:stop]
        return codes[start:stop], scale_inv[start // TILE : -(-stop // TILE)]

    def launch(self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """See the base class."""
        from prodial_kernels.kernels.dequantize import dequantize_fp8

        codes, scale_inv = packed
        return dequantize_fp8(codes, scale_inv, out, dtype=dtype)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """A value per tile -> a value per element of ``like`` [rows, K]."""
    wide = scale.repeat_interleave(TILE, 1)[:, : like.shape[1]]
    return wide.repeat_interleave(TILE, 0)[: like.shape[0]]
