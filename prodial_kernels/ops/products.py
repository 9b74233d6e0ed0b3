"""Products that sum over the tokens: in fp32 to the end, so that only the caller rounds them."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return [N, M] @ [M, K], or a batch of such, in fp32; of operands in fp64 in fp64.

    Sums over many tokens can leave fp16's range, and bf16 would keep 8 bits of each; the gradients
    that they become are fp32 where the masters are.
    """
    half = left.dtype in (torch.float16, torch.bfloat16)
    if left.is_cuda and half and torch.version.hip is None and left.numel():
        if left.ndim == 2:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.bmm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)
