"""Stand-ins for the mixers of Vim and MambaVision: the same names, and the same use of weights.

As Vim's own, the first multiplies by ``in_proj.weight`` in every path and by ``out_proj.weight``
in the fused one, and loses the backward direction without the fast path. Plain PyTorch,
sequential in time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.mixers.cuda_stand_ins import conv, scan


def mamba_inner_fn_no_out_proj(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor,
) -> Tensor:  # fmt: skip
    """xz [b, 2E, l] -> [b, E, l]."""
    x, z = xz.chunk(2, dim=1)
    u = conv(x, conv1d_weight[:, 0], conv1d_bias, None)
    sizes = [delta_proj_weight.shape[1], A.shape[1], A.shape[1]]
    dt, B, C = (x_proj_weight @ u).split(sizes, dim=1)
    y, _ = scan(u, delta_proj_weight @ dt, A, B[:, None], C[:, None], D, delta_bias)
    return (y * F.silu(z)).to(xz.dtype)


def mamba_inner_fn(xz: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor) -> Tensor:
    """xz [b, 2E, l] -> [b, l, d]."""
    return F.linear(mamba_inner_fn_no_out_proj(xz, *rest).mT, weight, bias)


class Mamba(nn.Module):
    """Vim's mixer, types "v2" and "none"; "v1" only has a name."""

    def __init__(
        self, d_model: int, bimamba_type: str = "v2", if_divide_out: bool = True,
        init_layer_scale: float | None = None, bias: bool = False, use_fast_path: bool = True,
        d_state: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        inner, self.dt_rank, self.d_state = 2 * d_model, 3, d_state
        self.bimamba_type, self.if_divide_out = bimamba_type, if_divide_out
        self.init_layer_scale, self.use_fast_path = init_layer_scale, use_fast_path
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        for suffix in ("", "_b") if bimamba_type == "v2" else ("",):
            convolution = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
            setattr(self, f"conv1d{suffix}", convolution)
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, 3 + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{suffix}", nn.Linear(3, inner))
            A = torch.arange(1.0, d_state + 1).log().repeat(inner, 1)
            setattr(self, f"A{suffix}_log", nn.Parameter(A + 0.1 * torch.randn_like(A)))
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        batch, length, _ = hidden_states.shape
        xz = self.in_proj.weight @ hidden_states.flatten(0, 1).t()
        xz = xz.unflatten(1, (batch, length)).transpose(0, 1)
        if self.in_proj.bias is not None:
            xz = xz + self.in_proj.bias.to(dtype=xz.dtype)[:, None]
        A = -torch.exp(self.A_log.float())
        ahead = (
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, A,
            self.D.float(), self.dt_proj.bias.float(),
        )  # fmt: skip
        if self.use_fast_path and inference_params is None:
            if self.bimamba_type == "v2":
                A_b = -torch.exp(self.A_b_log.float())
                out = mamba_inner_fn_no_out_proj(*ahead)
                out_b = mamba_inner_fn_no_out_proj(
                    xz.flip([-1]), self.conv1d_b.weight, self.conv1d_b.bias, self.x_proj_b.weight,
                    self.dt_proj_b.weight, A_b, self.D_b.float(), self.dt_proj_b.bias.float(),
                )  # fmt: skip
                out = (out + out_b.flip([-1])).mT
                if self.if_divide_out:
                    out = out / 2
                out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
            else:
                xz, *rest = ahead
                out = mamba_inner_fn(xz, self.out_proj.weight, self.out_proj.bias, *rest)
        else:
            out = self.out_proj(mamba_inner_fn_no_out_proj(*ahead).mT)
        return out if self.init_layer_scale is None else out * self.gamma


class MambaVisionMixer(nn.Module):
    """MambaVision's mixer: half of the channels are scanned, half only convolved."""

    def __init__(self, d_model: int, d_state: int = 4) -> None:
        super().__init__()
        half, self.sizes = d_model // 2, [3, d_state, d_state]
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.x_proj = nn.Linear(half, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(3, half)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, groups=half, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, z = self.in_proj(hidden_states).mT.chunk(2, dim=1)
        A = -torch.exp(self.A_log.float())
        x = F.silu(F.conv1d(x, self.conv1d_x.weight, padding="same", groups=x.shape[1]))
        z = F.silu(F.conv1d(z, self.conv1d_z.weight, padding="same", groups=z.shape[1]))
        dt, B, C = self.x_proj(x.mT).split(self.sizes, dim=-1)
        delta = self.dt_proj(dt).mT
        y, _ = scan(
            x, delta, A, B.mT[:, None], C.mT[:, None], self.D.float(), self.dt_proj.bias.float()
        )
        return self.out_proj(torch.cat([y, z], dim=1).mT)
