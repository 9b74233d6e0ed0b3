"""RMSNorm with the residual addition in front of it, fused where mamba-ssm is installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AddRMSNorm(nn.Module):
    """``residual + x`` in fp32, and its RMSNorm in the dtype of ``x``."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        """Normalise the last dimension, ``width`` wide."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normed sum, in the dtype of ``x``, and the sum, in fp32 or wider.

        Both are [..., width], as ``x`` and ``residual`` are, which is None for zeros.
        """
        if x.is_cuda and x.dtype != torch.float64 and find_spec("mamba_ssm") is not None:
            from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

            return rms_norm_fn(
                x, self.weight, None, residual=residual, eps=self.eps, prenorm=True,
                residual_in_fp32=True,
            )  # fmt: skip
        wide = torch.promote_types(torch.float32, x.dtype)
        total = x.to(wide) if residual is None else residual + x
        normed = F.rms_norm(total, total.shape[-1:], self.weight.to(wide), self.eps)
        return normed.to(x.dtype), total
