"""Stand-ins for the fused CUDA training functions: whole block in, block output out.

As the real ones do, they multiply by the ``out_proj`` weight that they are handed, so that the
projector's module is never called. Plain PyTorch, sequential in time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.mixers.cuda_stand_ins import conv as packed_conv


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: None = None,
    C: None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Mamba's block after ``in_proj``: xz [b, 2E, l] -> [b, l, d]."""
    assert B is None
    assert C is None
    assert delta_softplus
    state_size, rank = A.shape[1], delta_proj_weight.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = F.silu(_causal_conv1d(x, conv1d_weight, conv1d_bias))
    projected = F.linear(x.transpose(1, 2), x_proj_weight)
    dt, B, C = projected.split([rank, state_size, state_size], dim=-1)
    if b_rms_weight is not None:
        dt, B, C = (F.rms_norm(t, t.shape[-1:], eps=b_c_dt_rms_eps) for t in (dt, B, C))
    dt = F.softplus(F.linear(dt, delta_proj_weight, delta_bias)).transpose(1, 2)
    state = x.new_zeros(x.shape[0], x.shape[1], state_size)
    outputs = []
    for t in range(x.shape[-1]):
        decay = torch.exp(dt[:, :, t, None] * A)
        state = decay * state + (dt[:, :, t] * x[:, :, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, dim=-1) + x * D[:, None]
    return F.linear((y * F.silu(z)).transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba2_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    dt_limit: tuple[float, float],
    activation: str,
    rmsnorm_weight: Tensor | None,
    rmsnorm_eps: float | None,
    outproj_weight: Tensor | None,
    outproj_bias: Tensor | None,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    return_final_states: bool,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mamba-2's block after ``in_proj``: zxbcdt [b, l, 2E + 2N + H] -> [b, l, d], one group.

    Without an ``out_proj`` weight: [b, l, E]. State and convolution begin anew where ``seq_idx``
    [b, l] changes.
    """
    assert ngroups == 1
    assert activation == "silu"
    assert not norm_before_gate
    assert not return_final_states
    heads = A.shape[0]
    inner = heads * headdim
    state_size = (conv1d_weight.shape[0] - inner) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * state_size, heads], dim=-1)
    xbc = xbc.transpose(1, 2)
    if seq_idx is None:
        xbc = F.silu(_causal_conv1d(xbc, conv1d_weight, conv1d_bias)).transpose(1, 2)
        same = xbc.new_ones(xbc.shape[:2])
    else:
        xbc = packed_conv(xbc, conv1d_weight, conv1d_bias, seq_idx).transpose(1, 2)
        same = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0)).to(xbc.dtype)
    x, B, C = xbc.split([inner, state_size, state_size], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    state = x.new_zeros(x.shape[0], heads, headdim, state_size)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None] * same[:, t, None, None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        outputs.append((state * C[:, t, None, None]).sum(-1))
    y = torch.stack(outputs, dim=1) + x * D[:, None]
    y = y.flatten(-2) * F.silu(z)
    if rmsnorm_weight is not None:
        y = F.rms_norm(y, y.shape[-1:], rmsnorm_weight, rmsnorm_eps)
    if outproj_weight is None:
        assert outproj_bias is None
        return y
    return F.linear(y, outproj_weight, outproj_bias)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise: x [b, channels, l], weight [channels, width] or [channels, 1, width]."""
    weight = weight.reshape(weight.shape[0], 1, -1)
    padded = F.pad(x, (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight, bias, groups=weight.shape[0])
