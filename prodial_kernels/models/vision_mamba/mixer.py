"""The bidirectional mixer of Vision Mamba (arXiv:2401.09417), with the published names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prodial_kernels.models.mixers.selective_scan import BACKWARD, FORWARD
from prodial_kernels.models.mixers.vim import bidirectional_mamba

# Mamba's range of the initial step size Δ.
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


class BidirectionalMamba(nn.Module):
    """``out_proj((forward scan + backward scan) / 2)``, both scans on one ``in_proj``.

    Each direction has its own convolution, ``x_proj``, ``dt_proj``, ``A`` and ``D``; the backward
    one's names end in ``_b``. Only the projectors are shared, and they are called as modules.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        scan: str = "auto",
    ) -> None:
        """Build a mixer of ``width`` channels.

        Args:
            width: d, the model's width.
            d_state: N, states per channel.
            d_conv: Width of the convolution.
            expand: E / d.
            scan: ``"auto"`` (CUDA functions on a CUDA device, else PyTorch), ``"cuda"`` or
                ``"torch"``.
        """
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.scan = scan
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for names in (FORWARD, BACKWARD):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
            setattr(self, names.conv1d, conv)
            setattr(self, names.x_proj, nn.Linear(inner, rank + 2 * d_state, bias=False))
            setattr(self, names.dt_proj, _step_size(rank, inner))
            A_log = torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1)
            setattr(self, names.A_log, nn.Parameter(A_log))
            setattr(self, names.D, nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        return bidirectional_mamba(self, hidden_states, average=True, scan=self.scan)


def _step_size(rank: int, inner: int) -> nn.Linear:
    """``dt_proj``, with a bias that makes softplus(bias) log-uniform in Mamba's range."""
    layer = nn.Linear(rank, inner)
    nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    dt = torch.exp(low + (high - low) * torch.rand(inner)).clamp(min=_DT_FLOOR)
    with torch.no_grad():
        # The inverse of softplus.
        layer.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    return layer
