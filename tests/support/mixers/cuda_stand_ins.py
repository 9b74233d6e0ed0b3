"""Stand-ins for the CUDA extensions of mamba-ssm and causal-conv1d, as strict as they are.

Plain PyTorch, sequential in time; the backward differentiates the forward. What the real functions
refuse or require (strides, dtypes, preallocated outputs) is asserted, so that a path which passes
here passes their checks too.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

calls: Counter[str] = Counter()
"""How often each function was called."""


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``selective_scan_cuda`` and ``causal_conv1d`` importable, and count from 0."""
    calls.clear()
    scan = _module("selective_scan_cuda", fwd=scan_fwd, bwd=scan_bwd)
    conv = _module(
        "causal_conv1d.cpp_functions",
        causal_conv1d_fwd_function=conv_fwd,
        causal_conv1d_bwd_function=conv_bwd,
    )
    for module in (scan, _module("causal_conv1d", cpp_functions=conv), conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def scan_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    delta_bias: Tensor, delta_softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """``selective_scan_cuda.fwd``: [out, states], and out ⊙ silu(z) where z is given."""
    calls["scan_fwd"] += 1
    _check_scan(u, delta, A, B, C, D, u if z is None else z, delta_bias)
    assert delta_softplus
    y, last = scan(*(t.detach() for t in (u, delta, A, B, C, D, delta_bias)))
    states = torch.zeros(*y.shape[:2], -(-y.shape[2] // 2048), 2 * A.shape[1])
    states[:, :, -1, 1::2] = last
    gated = [] if z is None else [(y * F.silu(z)).to(u.dtype)]
    return [y.to(u.dtype), states, *gated]


def scan_bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor, dout: Tensor, states: Tensor, out: Tensor, dz: Tensor,
    delta_softplus: bool, recompute_out_z: bool,
) -> list[Tensor]:  # fmt: skip
    """``selective_scan_cuda.bwd``; writes ``dz`` in place."""
    calls["scan_bwd"] += 1
    _check_scan(u, delta, A, B, C, D, z, delta_bias, dout, out, dz)
    assert delta_softplus
    assert states.shape == (*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
    operands = (u, delta, A, B, C, D, delta_bias, z)
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    with torch.enable_grad():
        y, _ = scan(*leaves[:7])
        torch.testing.assert_close(y.detach().to(out.dtype), out)
        gated = y * F.silu(leaves[7])
        *gradients, dz_value = torch.autograd.grad(gated, leaves, dout.to(gated.dtype))
    dz.copy_(dz_value)
    return [*gradients, dz, *([gated.detach().to(u.dtype)] if recompute_out_z else [])]


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The selective scan in fp32 or wider: y [b, E, l] and the last state [b, E, N]."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C = (t.to(wide) for t in (u, delta, B[:, 0], C[:, 0]))
    dt = F.softplus(delta + delta_bias[:, None])
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, None] * A)
        state = decay * state + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, dim=-1) + u * D[:, None], state


def conv_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None,
    initial_states: None, final_states_out: None, silu_activation: bool,
) -> Tensor:  # fmt: skip
    """``causal_conv1d_fwd_function``."""
    calls["conv_fwd"] += 1
    _check_conv(x, weight, bias, initial_states, final_states_out, silu_activation)
    return torch.empty_like(x).copy_(conv(x, weight, bias, seq_idx))


def conv_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None,
    initial_states: None, dfinal_states: None, dx: Tensor, return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, None]:  # fmt: skip
    """``causal_conv1d_bwd_function``; writes ``dx`` in place."""
    calls["conv_bwd"] += 1
    _check_conv(x, weight, bias, initial_states, dfinal_states, silu_activation)
    assert not return_dinitial_states
    assert dout.stride(2) == 1 or dout.stride(1) == 1
    assert dx.shape == x.shape
    assert dx.stride() == x.stride()
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.enable_grad():
        y = conv(leaves[0], leaves[1], leaves[2] if bias is not None else None, seq_idx)
        gradients = torch.autograd.grad(y, leaves, dout.to(y.dtype))
    dx.copy_(gradients[0])
    return dx, gradients[1], gradients[2] if bias is not None else None, None


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """``silu`` of the causal depthwise convolution: x [b, E, l], weight [E, width]."""
    width = weight.shape[1]
    windows = F.pad(x, (width - 1, 0)).unfold(2, width, 1)
    if seq_idx is not None:
        before = F.pad(seq_idx, (width - 1, 0), value=-1).unfold(1, width, 1)
        windows = windows * (before == seq_idx[..., None])[:, None]
    y = (windows * weight[:, None]).sum(-1)
    return F.silu(y if bias is None else y + bias[:, None])


def _check_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor) -> None:
    D, z, delta_bias, *gradients = rest
    batch, inner, length = u.shape
    for tensor in (u, delta, B, C, z, *gradients):
        assert tensor.dtype == u.dtype
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    for tensor in (delta, z, *gradients):
        assert tensor.shape == u.shape
    assert A.shape[0] == inner
    assert B.shape == C.shape == (batch, 1, A.shape[1], length)
    assert D.shape == delta_bias.shape == (inner,)
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
    initial_states, other_states, silu_activation = rest
    assert initial_states is None
    assert other_states is None
    assert silu_activation
    assert x.stride(2) == 1 or x.stride(1) == 1
    assert weight.shape[0] == x.shape[1]
    assert weight.ndim == 2
    assert bias is None or bias.stride() == (1,)


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(members)
    return module
