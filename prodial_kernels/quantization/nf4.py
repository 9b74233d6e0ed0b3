"""NF4 in bitsandbytes' layout: 4-bit normal-float codes, two a byte, a scale every 64 weights.

With double quantisation the scales, less their mean, are themselves stored in 8 bits, with an
fp32 scale every 256 of them: 0.5 + 1/64 + 4/(64·256) = 0.516 bytes a weight, against 0.5625.
Checked against bitsandbytes 0.50.2 on the CPU: what it stores is read to the same values bit for
bit, and without double quantisation the bytes made here are its own. With it the codes are; but the
mean of the scales is taken in fp64, so that every device makes the same bytes, and can be an ulp
from bitsandbytes' fp32 mean, and 2 in 1,000 of the 8-bit scales are the entry beside the one that
bitsandbytes takes, which is not always the nearest (:mod:`prodial_kernels.quantization.blockwise`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from prodial_kernels.quantization.blockwise import (
    dequantize_blockwise,
    dynamic_map,
    quantize_blockwise,
)
from prodial_kernels.quantization.layer import (
    CHUNK,
    QuantizedLinear,
    check_scales,
    takes_kernels,
)
from prodial_kernels.quantization.names import is_one_of

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__nf4"
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
# Of a table that was stored in bfloat16.
_TABLE_ROUNDING = 2**-8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Quantiles of a standard normal, scaled to [-1, 1] (QLoRA, appendix E).
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class NF4Linear(QuantizedLinear):
    """A layer whose weight is in NF4.

    Buffers: ``codes`` [⌈N·K / 2⌉, 1] uint8, the earlier weight in the high half of a byte;
    ``absmax`` [⌈N·K / blocksize⌉], fp32 or, double-quantised, uint8; ``quant_map`` [16] fp32; the
    ``nested_*`` ones are None without double quantisation.
    """

    FORMAT: ClassVar[str] = "nf4"
    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        codes: Tensor,
        absmax: Tensor,
        quant_map: Tensor,
        blocksize: int = BLOCKSIZE,
        nested: tuple[Tensor, Tensor, Tensor] | None = None,
        nested_blocksize: int = NESTED_BLOCKSIZE,
    ) -> None:
        """Hold the stored tensors; ``nested`` is absmax, quant_map and offset of the scales."""
        super().__init__(in_features, out_features, bias, dtype)
        self.blocksize = blocksize
        self.nested_blocksize = nested_blocksize
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("quant_map", quant_map)
        names = ("nested_absmax", "nested_quant_map", "nested_offset")
        for name, tensor in zip(names, nested or (None, None, None), strict=True):
            self.register_buffer(name, tensor)

    @classmethod
    @torch.no_grad()
    def quantize(
        cls, weight: Tensor, bias: Tensor | None, *, double_quantization: bool = True
    ) -> NF4Linear:
        """Quantise as bitsandbytes' ``quantize_4bit`` does; see the base class."""
        table = torch.tensor(NF4_TABLE, device=weight.device)
        flat = weight.reshape(-1)
        packed, scales = [], []
        for start in range(0, flat.numel(), CHUNK):
            codes, absmax = quantize_blockwise(
                flat[start : start + CHUNK].float(), table, BLOCKSIZE
            )
            if codes.numel() % 2:
                # The code of 0 fills the last byte.
                codes = torch.cat([codes, codes.new_full((1,), NF4_TABLE.index(0.0))])
            packed.append((codes[::2] << 4) | codes[1::2])
            scales.append(absmax)
        absmax = torch.cat(scales)
        nested = None
        if double_quantization:
            # In fp64, where the order of the sum, which devices choose, rounds away.
            offset = absmax.double().mean().float()
            nested_map = dynamic_map().to(weight.device)
            absmax, outer = quantize_blockwise(absmax - offset, nested_map, NESTED_BLOCKSIZE)
            nested = (outer, nested_map, offset)
        return cls(
            weight.shape[1], weight.shape[0], bias, weight.dtype,
            codes=torch.cat(packed)[:, None], absmax=absmax, quant_map=table, nested=nested,
        )  # fmt: skip

    def rounded(self, weight: Tensor) -> NF4Linear:
        """See the base class; its scales are made anew."""
        if (self.blocksize, self.nested_blocksize) != (BLOCKSIZE, NESTED_BLOCKSIZE):
            raise ValueError(
                f"NF4 with a scale for {self.blocksize} weights (nested {self.nested_blocksize}) "
                f"is read and not made; what is made has {BLOCKSIZE} ({NESTED_BLOCKSIZE})"
            )
        double = self.nested_absmax is not None
        return NF4Linear.quantize(weight, self.bias, double_quantization=double)

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype | None
    ) -> NF4Linear:
        """See the base class; ``dtype`` defaults to the one that the quant state names."""
        state = _read_state(entries[_STATE])
        out_features, in_features = state["shape"]
        count, blocksize = out_features * in_features, state["blocksize"]
        # bitsandbytes' quant_storage may have packed the same bytes as another dtype.
        codes = entries["weight"].contiguous().view(-1).view(torch.uint8).view(-1, 1)
        absmax, quant_map = entries["weight.absmax"], entries["weight.quant_map"]
        _check_count("weight", codes, -(-count // 2))
        _check_count("weight.absmax", absmax, -(-count // blocksize))
        _check_count("weight.quant_map", quant_map, len(NF4_TABLE))
        check_scales("weight.quant_map", quant_map)
        # bitsandbytes' kernels have the table built in and do not look at the stored one.
        if (quant_map.float().cpu() - torch.tensor(NF4_TABLE)).abs().max() > _TABLE_ROUNDING:
            raise ValueError(f"weight.quant_map must be NF4's table, got {quant_map.tolist()}")
        nested = None
        nested_blocksize = state.get("nested_blocksize", NESTED_BLOCKSIZE)
        if "nested_offset" in state:
            outer, nested_map = entries["weight.nested_absmax"], entries["weight.nested_quant_map"]
            _check_count("weight.nested_absmax", outer, -(-absmax.numel() // nested_blocksize))
            _check_count("weight.nested_quant_map", nested_map, 256)
            check_scales("weight.nested_absmax", outer)
            check_scales("weight.nested_quant_map", nested_map)
            if not (nested_map[1:] > nested_map[:-1]).all():
                raise ValueError("weight.nested_quant_map must ascend")
            if absmax.dtype != torch.uint8:
                raise ValueError(
                    f"weight.absmax must be uint8 with double quantisation, got {absmax.dtype}"
                )
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
            nested = (outer.float().view(-1), nested_map.float().view(-1), offset)
            absmax = absmax.view(-1)
        else:
            check_scales("weight.absmax", absmax)
            absmax = absmax.float().view(-1)
        return cls(
            in_features, out_features, bias, _DTYPES[state["dtype"]] if dtype is None else dtype,
            codes=codes, absmax=absmax, quant_map=quant_map.float().view(-1), blocksize=blocksize,
            nested=nested, nested_blocksize=nested_blocksize,
        )  # fmt: skip

    def entries(self) -> dict[str, Tensor]:
        """The entries of bitsandbytes' ``Linear4bit`` but for the bias."""
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": _name(self.dtype),
            "shape": [self.out_features, self.in_features],
        }
        entries = {
            "weight": self.codes,
            "weight.absmax": self.absmax,
            "weight.quant_map": self.quant_map,
        }
        if (
            self.nested_absmax is not None
            and self.nested_quant_map is not None
            and self.nested_offset is not None
        ):
            entries["weight.nested_absmax"] = self.nested_absmax
            entries["weight.nested_quant_map"] = self.nested_quant_map
            state["nested_blocksize"] = self.nested_blocksize
            state["nested_dtype"] = "float32"
            state["nested_offset"] = self.nested_offset.item()
        entries[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return entries

    def write(self, packed: tuple[Tensor, ...], out: Tensor) -> None:
        """See the base class."""
        codes, absmax, quant_map, *nested = packed
        if nested:
            outer, nested_map, offset = nested
            absmax = dequantize_blockwise(absmax, outer, nested_map, self.nested_blocksize) + offset
        flat = out.view(-1)
        # Both weights of a byte at once: row c holds the values of c's high and low half.
        pairs = torch.cartesian_prod(quant_map, quant_map)
        bytes_ = codes.view(-1)
        full = flat.numel() // self.blocksize * self.blocksize
        for start in range(0, full, CHUNK):
            stop = min(start + CHUNK, full)
            torch.mul(
                pairs[bytes_[start // 2 : stop // 2].int()].view(-1, self.blocksize),
                absmax[start // self.blocksize : stop // self.blocksize, None],
                out=flat[start:stop].view(-1, self.blocksize),
            )
        if full < flat.numel():
            rest = pairs[bytes_[full // 2 :].int()].view(-1)[: flat.numel() - full]
            torch.mul(rest, absmax[-1], out=flat[full:])

    def gather(self, packed: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """See the base class."""
        codes, absmax, quant_map, *nested = packed
        k = self.in_features
        if k % 2 == 0:
            pairs = torch.cartesian_prod(quant_map, quant_map)
            values = pairs[codes.view(-1, k // 2)[rows].int()].view(len(rows), k)
        else:
            # A byte may hold the end of a row and the beginning of the next.
            at = rows[:, None] * k + torch.arange(k, device=rows.device)
            both = codes.view(-1)[at // 2]
            values = quant_map[torch.where(at % 2 == 0, both >> 4, both & 15).int()]
        # Weights in a row that share a scale wherever the row begins.
        shared = math.gcd(k, self.blocksize)
        first = torch.arange(0, k, shared, device=rows.device)
        blocks = (rows[:, None] * k + first).div_(self.blocksize, rounding_mode="floor")
        scales = absmax[blocks]
        if nested:
            outer, nested_map, offset = nested
            nested_blocks = blocks.div_(self.nested_blocksize, rounding_mode="floor")
            scales = nested_map[scales.int()].mul_(outer[nested_blocks]) + offset
        values.view(len(rows), -1, shared).mul_(scales[..., None])
        return values.to(dtype)

    @property
    def row_multiple(self) -> int:
        """See the base class: rows that begin where a block begins, of the scales too."""
        weights = self.blocksize * (1 if self.nested_absmax is None else self.nested_blocksize)
        return weights // math.gcd(weights, self.in_features)

    def cut(self, packed: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """See the base class."""
        codes, absmax, quant_map, *nested = packed
        first, last = start * self.in_features, stop * self.in_features
        codes = codes[first // 2 : -(-last // 2)]
        first, last = first // self.blocksize, -(-last // self.blocksize)
        absmax = absmax[first:last]
        if not nested:
            return codes, absmax, quant_map
        outer, nested_map, offset = nested
        outer = outer[first // self.nested_blocksize : -(-last // self.nested_blocksize)]
        return codes, absmax, quant_map, outer, nested_map, offset

    def launch(self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """See the base class."""
        from prodial_kernels.kernels.dequantize import dequantize_nf4

        codes, absmax, quant_map, *nested = packed
        return dequantize_nf4(
            codes, absmax, quant_map, (nested[0], nested[1], nested[2]) if nested else None, out,
            shape=(self.out_features, self.in_features), dtype=dtype,
            blocksize=self.blocksize, nested_blocksize=self.nested_blocksize,
        )  # fmt: skip

    @torch.no_grad()
    def unpack_some(
        self, stacked: tuple[Tensor, ...], ids: Tensor, known: list[int], out: Tensor
    ) -> Tensor:
        """See the base class; one launch on a GPU."""
        if not takes_kernels(out.device, out.dtype):
            return super().unpack_some(stacked, ids, known, out)
        from prodial_kernels.kernels.dequantize import dequantize_nf4_some

        codes, absmax, quant_map, *nested = stacked
        with torch.cuda.device_of(out):
            dequantize_nf4_some(
                codes, absmax, quant_map, (nested[0], nested[1], nested[2]) if nested else None,
                ids, out, blocksize=self.blocksize, nested_blocksize=self.nested_blocksize,
            )  # fmt: skip
        return out

    def _take(self, other: QuantizedLinear) -> None:
        super()._take(other)
        if isinstance(other, NF4Linear):
            self.blocksize, self.nested_blocksize = other.blocksize, other.nested_blocksize


def _name(dtype: torch.dtype) -> str:
    """How the quant state calls ``dtype``; the format knows nothing wider than fp32."""
    return next((name for name, known in _DTYPES.items() if known == dtype), "float32")


def _read_state(tensor: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.tolist()))
        read = {key: state[key] for key in ("quant_type", "shape", "blocksize", "dtype")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_STATE} is damaged ({error}); fetch the checkpoint again") from error
    nested = {name: state[name] for name in _NESTED if name in state}
    fits = (
        read["quant_type"] == "nf4"
        and is_one_of(read["blocksize"], _BLOCKSIZES)
        and is_one_of(read["dtype"], tuple(_DTYPES))
        and isinstance(read["shape"], list)
        and len(read["shape"]) == 2
        and all(type(size) is int and size > 0 for size in read["shape"])
        # Nothing that bitsandbytes might mean by another field is guessed.
        and state.keys() == read.keys() | nested.keys()
        and len(nested) in (0, len(_NESTED))
    )
    if fits and nested:
        offset = nested["nested_offset"]
        fits = (
            is_one_of(nested["nested_blocksize"], _BLOCKSIZES)
            and nested["nested_dtype"] == "float32"
            and type(offset) in (int, float)
            and math.isfinite(offset)
        )
    if not fits:
        raise ValueError(
            f"{_STATE} must describe a matrix: quant_type 'nf4', a shape of two sizes, a blocksize "
            f"of {_BLOCKSIZES}, a dtype of {tuple(_DTYPES)} and, with double quantisation, "
            f"{', '.join(_NESTED)} (such a blocksize, 'float32', a finite number); got {state}"
        )
    return {**read, **nested}


def _check_count(name: str, tensor: Tensor, expected: int) -> None:
    if tensor.numel() != expected:
        raise ValueError(f"{name} must have {expected} elements, got shape {list(tensor.shape)}")
