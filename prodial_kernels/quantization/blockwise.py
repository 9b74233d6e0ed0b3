"""Block-wise quantisation to a table of values, as bitsandbytes does it.

Block j of a flat tensor is stored as ``absmax[j] = max |v|`` and, per value, the index of the
table's entry nearest to ``v / absmax[j]``; ties go to the smaller entry. The order of the fp32
operations is that of bitsandbytes' 4-bit code, so that its bytes are equal too. Its CPU code for
8 bits looks the entry up by ``v / absmax[j]`` rounded to 65,536 steps, which near the middle
between two entries is not always the nearest: there these bytes differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-38


def quantize_blockwise(values: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """[n] fp32 -> indices [n] uint8 and absmax [⌈n / blocksize⌉] fp32; ``table`` is sorted."""
    bounds = (table[:-1] + table[1:]) / 2
    full = values.numel() // blocksize * blocksize
    blocks = values[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(-1)
    indices = torch.bucketize(
        (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1), bounds, out_int32=True
    ).to(torch.uint8)
    if full == values.numel():
        return indices.view(-1), absmax
    rest = values[full:]
    last = rest.abs().amax().clamp(min=_TINY)
    last_indices = torch.bucketize((rest / last).clamp_(-1, 1), bounds, out_int32=True)
    return (
        torch.cat([indices.view(-1), last_indices.to(torch.uint8)]),
        torch.cat([absmax, last[None]]),
    )


def dequantize_blockwise(indices: Tensor, absmax: Tensor, table: Tensor, blocksize: int) -> Tensor:
    """Indices [n] uint8 -> values [n] fp32."""
    values = table[indices.int()]
    return values.mul_(absmax.repeat_interleave(blocksize)[: values.numel()])


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic table [256] fp32 that bitsandbytes stores scales with.

    Seven decades below 1; decade i holds the midpoints of 2^i equal steps from 0.1 to 1, with
    both signs; then 0 and 1 (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning").
    """
    entries = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        steps = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        entries += [*steps.tolist(), *(-steps).tolist()]
    return torch.tensor(sorted(entries), dtype=torch.float32)
