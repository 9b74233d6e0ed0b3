"""Weights in the published layouts of GPTQ, AWQ, compressed-tensors and HQQ, packed bit by bit.

Written from the layouts as these libraries document and unpack them, without any of the package's
own packing; ``tests/quantization/other_libraries`` compares both with the libraries where they are
installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.quantization.groups.layer import GroupedLinear
from prodial_kernels.quantization.groups.words import width_of


@dataclass
class Case:
    """Codes, scales and zero points of a weight, and which group a column is of.

    Attributes:
        codes: [N, K] int64.
        scales: [N, S] floating point.
        zeros: [N, S] int64.
        order: [K] int64.
        bits: Of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor
    bits: int

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in fp64, rounded once."""
        exact = (self.codes - self.zeros[:, self.order]).double()
        exact *= self.scales.double()[:, self.order]
        return exact.to(self.scales.dtype if dtype is None else dtype)


def case(
    n: int, k: int, bits: int = 4, group: int = 32, *, symmetric: bool = False,
    shuffled: bool = False, dtype: torch.dtype = torch.float16,
) -> Case:  # fmt: skip
    """Every code and zero point, and scales far apart: what is taken for another's shows."""
    torch.manual_seed(n + k + bits)
    groups = -(-k // group)
    order = torch.arange(k) // group
    return Case(
        torch.randint(1 << bits, (n, k)),
        (torch.logspace(-3, 0, n)[:, None] * (torch.rand(n, groups) + 0.5)).to(dtype),
        torch.full((n, groups), 1 << (bits - 1))
        if symmetric
        else torch.randint(1, 1 << bits, (n, groups)),
        order[torch.randperm(k)] if shuffled else order,
        bits,
    )


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes [m, count] as one long number each, in words of 32 bits from its lowest on."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * at)) & 0xFFFFFFFF for at in range(count)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def gptq(of: Case, version: int = 1) -> dict[str, Tensor]:
    """auto-gptq's entries; in version 1 zero points are stored less one."""
    stored = (of.zeros - (1 if version == 1 else 0)) & ((1 << of.bits) - 1)
    return {
        "qweight": words(of.codes, of.bits).t().contiguous(),
        "qzeros": words(stored.t(), of.bits),
        "scales": of.scales.t().contiguous(),
        "g_idx": of.order.to(torch.int32),
    }


def awq(of: Case) -> dict[str, Tensor]:
    """AutoAWQ's ``WQLinear_GEMM``: places 0, 1, 2, … of a word hold rows 0, 2, 4, 6, 1, 3, 5, 7."""

    def interleaved(matrix: Tensor) -> Tensor:
        eights = matrix.reshape(len(matrix), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(eights.reshape(matrix.shape), 4)

    return {
        "qweight": interleaved(of.codes.t()),
        "qzeros": interleaved(of.zeros.t()),
        "scales": of.scales.t().contiguous(),
    }


def compressed(of: Case, *, symmetric: bool = False) -> dict[str, Tensor]:
    """compressed-tensors' ``pack-quantized``: codes less 2^(bits − 1) are the signed values."""
    entries = {
        "weight_packed": words(of.codes, of.bits),
        "weight_scale": of.scales.contiguous(),
        "weight_shape": torch.tensor(of.codes.shape),
    }
    if not symmetric:
        entries["weight_zero_point"] = words(of.zeros.t(), of.bits).t().contiguous()
    return entries


def hqq(of: Case, zeros: Tensor, axis: int, size: int) -> tuple[Tensor, dict[str, Any], Tensor]:
    """hqq's ``W_q`` and ``meta``, and its weight: rounded after each of its two operations.

    ``zeros`` and ``of.scales`` are flat, one for each group of ``size`` values.
    """
    shape = [-1, size] if axis == 1 else [size, -1]
    rows, fine = of.codes.reshape(shape), [-1, 1] if axis == 1 else [1, -1]
    per_byte = 8 // of.bits
    part = len(rows) // per_byte
    packed = sum(
        rows[place * part : (place + 1) * part] << (of.bits * (per_byte - 1 - place))
        for place in range(per_byte)
    )
    scale, zero = of.scales.reshape(fine), zeros.reshape(fine)
    meta = {
        "nbits": of.bits, "group_size": size, "shape": of.codes.shape, "axis": axis,
        "packing": f"{of.bits}bit_u8", "view_as_float": False, "unpack_view_dtype": torch.uint8,
        "quant_scale": False, "quant_zero": False, "scale": scale, "zero": zero,
    }  # fmt: skip
    weight = ((rows.to(scale.dtype) - zero) * scale).reshape(of.codes.shape)
    return torch.as_tensor(packed).to(torch.uint8), meta, weight


def stored(
    n: int, k: int, bits: int = 4, group: int = 32, *, dtype: torch.dtype = torch.float16,
    zeros: str = "integers", shuffled: bool = False, repeats: int | None = None,
) -> GroupedLinear:  # fmt: skip
    """A layer of the package's own storage; ``zeros``: integers, floats or none."""
    of = case(n, k, bits, group, shuffled=shuffled, dtype=dtype)
    rows = n if repeats is None else repeats
    width = width_of(bits)
    padded = torch.nn.functional.pad(of.codes, (0, -k % (8 // width)))
    packed = sum(padded[:, at :: 8 // width] << (width * at) for at in range(8 // width))
    own = {"integers": of.zeros.to(torch.uint8), "none": None,
           "floats": (of.zeros + torch.rand(of.zeros.shape)).to(dtype)}[zeros]  # fmt: skip
    return GroupedLinear(
        k, n, None, dtype, codes=torch.as_tensor(packed).to(torch.uint8),
        scales=of.scales[:rows].contiguous(),
        zeros=None if own is None else own[:rows].contiguous(),
        zero=1 << (bits - 1), order=of.order.to(torch.int32) if shuffled else None, columns=group,
        bits=bits,
    )  # fmt: skip


STORED: list[dict[str, Any]] = [
    {"n": 72, "k": 256, "group": 128},
    {"n": 130, "k": 96, "group": 32, "zeros": "none"},
    {"n": 33, "k": 129, "group": 16, "zeros": "floats"},
    {"n": 7, "k": 77, "group": 11, "bits": 8},
    {"n": 40, "k": 100, "group": 100, "bits": 2, "zeros": "none"},
    {"n": 24, "k": 128, "group": 1, "zeros": "floats", "repeats": 6},
    {"n": 24, "k": 130, "group": 64, "zeros": "floats", "repeats": 1},
    {"n": 50, "k": 192, "group": 64, "bits": 3, "shuffled": True},
    {"n": 20, "k": 64, "group": 32, "bits": 5, "dtype": torch.bfloat16, "zeros": "floats"},
    {"n": 20, "k": 64, "group": 48, "dtype": torch.float32, "shuffled": True, "zeros": "none"},
]
"""Arguments of :func:`stored`: every storage, with ragged edges."""
