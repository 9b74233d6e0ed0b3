"""Stand-ins for mamba_ssm's mixers: the same names, shapes and reads of ``weight``.

``Mamba`` multiplies by ``in_proj.weight`` in every path, ``out_proj`` is bypassed in the fused
paths, and ``Mamba2``'s fused function without ``out_proj`` fails in its backward for
``d_ssm < d_inner``, as upstream's does. Everything is plain PyTorch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.mixers import cuda_stand_ins

fused_calls: list[str] = []
"""Names of the fused functions that were called."""


class Mamba(nn.Module):
    """Mamba-1's mixer."""

    def __init__(
        self, d_model: int, d_state: int = 4, bias: bool = False, use_fast_path: bool = True,
        layer_idx: int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, 4, 2 * d_model
        self.dt_rank, self.use_fast_path, self.layer_idx = 3, use_fast_path, layer_idx
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, dtype=dtype)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3, dtype=dtype)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, dtype=dtype)
        self.dt_proj = nn.Linear(self.dt_rank, inner, dtype=dtype)
        A = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(inner, 1)
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(inner) + 0.1 * torch.randn(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, dtype=dtype)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        batch, length, _ = hidden_states.shape
        states = None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, batch)
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        xz = self.in_proj.weight @ hidden_states.flatten(0, 1).t()
        xz = xz.unflatten(1, (batch, length)).transpose(0, 1)
        if self.in_proj.bias is not None:
            xz = xz + self.in_proj.bias.to(dtype=xz.dtype)[:, None]
        A = -torch.exp(self.A_log.float())
        if self.use_fast_path and inference_params is None:
            return mamba_inner_fn(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight,
                self.dt_proj.weight, self.out_proj.weight, self.out_proj.bias, A,
                self.D.float(), delta_bias=self.dt_proj.bias.float(),
            )  # fmt: skip
        x, z = xz.chunk(2, dim=1)
        if states is not None:
            states[0].copy_(F.pad(x, (self.d_conv - length, 0)))
        u = cuda_stand_ins.conv(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None)
        dbc = self.x_proj(u.transpose(1, 2).flatten(0, 1))
        dt, B, C = dbc.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = (self.dt_proj.weight @ dt.t()).unflatten(1, (batch, length)).transpose(0, 1)
        B, C = (t.unflatten(0, (batch, length)).transpose(1, 2)[:, None] for t in (B, C))
        y, last = cuda_stand_ins.scan(u, dt, A, B, C, self.D.float(), self.dt_proj.bias.float())
        if states is not None:
            states[1].copy_(last)
        return self.out_proj((y * F.silu(z)).to(hidden_states.dtype).transpose(1, 2))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Any:
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        conv_state.copy_(torch.roll(conv_state, shifts=-1, dims=-1))
        conv_state[:, :, -1] = x
        x = F.silu((conv_state * self.conv1d.weight.squeeze(1)).sum(-1) + self.conv1d.bias)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)
        A = -torch.exp(self.A_log.float())
        decay = torch.exp(dt[..., None] * A)
        ssm_state.copy_(ssm_state * decay + (dt * x)[..., None] * B[:, None])
        y = (ssm_state * C[:, None]).sum(-1) + self.D * x
        return self.out_proj(y * F.silu(z)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int) -> tuple[Tensor, Tensor]:
        device = self.out_proj.weight.device
        dtype = self.dt_proj.weight.dtype
        options = {"device": device, "dtype": dtype}
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, **options),
            torch.zeros(batch_size, self.d_inner, self.d_state, **options),
        )

    def _get_states_from_cache(self, inference_params: Any, batch_size: int) -> Any:
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return cache[self.layer_idx]


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
    D: Tensor, delta_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Mamba's block after ``in_proj``, ``out_proj`` included."""
    fused_calls.append("mamba_inner_fn")
    x, z = xz.chunk(2, dim=1)
    u = cuda_stand_ins.conv(x, conv1d_weight.squeeze(1), conv1d_bias, None)
    rank = delta_proj_weight.shape[1]
    dt, B, C = F.linear(u.mT, x_proj_weight).mT.split([rank, A.shape[1], A.shape[1]], dim=1)
    y, _ = cuda_stand_ins.scan(u, delta_proj_weight @ dt, A, B[:, None], C[:, None], D, delta_bias)
    return F.linear((y * F.silu(z)).to(xz.dtype).mT, out_proj_weight, out_proj_bias)


class _GatedNorm(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.eps = 1e-5

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return _layer_norm_fwd(y, self.weight, None, self.eps, z)[0]


def _layer_norm_fwd(
    y: Tensor, weight: Tensor, bias: None, eps: float, z: Tensor, out: None = None,
    group_size: int | None = None, norm_before_gate: bool = False, is_rms_norm: bool = True,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    assert bias is out is None
    assert not norm_before_gate
    assert is_rms_norm
    assert group_size in (None, y.shape[-1])
    gated = y * F.silu(z)
    rstd = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (gated * rstd * weight).to(y.dtype), None, rstd


class Mamba2Simple(nn.Module):
    """Mamba-2's mixer without decoding."""

    def __init__(
        self, d_model: int, d_state: int = 4, headdim: int = 4, bias: bool = False,
        use_mem_eff_path: bool = True, dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_inner = 2 * d_model
        self.d_ssm = options.pop("d_ssm", None) or self.d_inner
        self.d_state, self.headdim, self.ngroups = d_state, headdim, 1
        self.nheads = self.d_ssm // headdim
        self.use_mem_eff_path, self.rmsnorm = use_mem_eff_path, True
        for name, value in options.items():
            setattr(self, name, value)
        conv = self.d_ssm + 2 * d_state
        width = 2 * self.d_inner + 2 * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, dtype=dtype)
        self.conv1d = nn.Conv1d(conv, conv, 4, groups=conv, padding=3, dtype=dtype)
        self.dt_bias = nn.Parameter(torch.randn(self.nheads) - 2)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.nheads + 1).float()))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = _GatedNorm(self.d_ssm, dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, dtype=dtype)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        zxbcdt = self.in_proj(u)
        if self.use_mem_eff_path:
            return mamba_split_conv1d_scan_combined(
                zxbcdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias,
                -torch.exp(self.A_log), D=self.D, chunk_size=4, seq_idx=seq_idx,
                rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=1e-5, outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias, headdim=self.headdim,
                ngroups=self.ngroups, norm_before_gate=False,
            )  # fmt: skip
        return self.out_proj(_unfused(self, zxbcdt, seq_idx)[0])


class Mamba2(Mamba2Simple):
    """Mamba-2's mixer."""

    def __init__(
        self, d_model: int, layer_idx: int | None = None, process_group: Any = None, **options: Any
    ) -> None:
        super().__init__(d_model, **options)
        self.layer_idx, self.process_group = layer_idx, process_group

    def forward(
        self, u: Tensor, seqlen: int | None = None, seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None, inference_params: Any = None,
    ) -> Tensor:  # fmt: skip
        zxbcdt = self.in_proj(u)
        if seqlen is not None:
            zxbcdt = zxbcdt.unflatten(0, (-1, seqlen))
        if self.use_mem_eff_path and inference_params is None:
            out = mamba_split_conv1d_scan_combined(
                zxbcdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias,
                -torch.exp(self.A_log), D=self.D, chunk_size=4, seq_idx=seq_idx,
                rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=1e-5, outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias, headdim=self.headdim,
                ngroups=self.ngroups, norm_before_gate=False,
            )  # fmt: skip
            return out if seqlen is None else out.flatten(0, 1)
        y, state = _unfused(self, zxbcdt, seq_idx)
        if inference_params is not None:
            assert self.in_proj.weight.dtype == u.dtype
            inference_params.key_value_memory_dict[self.layer_idx] = state
        return self.out_proj(y if seqlen is None else y.flatten(0, 1))


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, chunk_size: int, initial_states: None = None, seq_idx: Tensor | None = None,
    dt_limit: Any = (0.0, float("inf")), return_final_states: bool = False,
    activation: str = "silu", rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
    headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """Mamba-2's block after ``in_proj``; without ``outproj_weight`` it stops before it."""
    return MambaSplitConv1dScanCombinedFn.apply(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states, seq_idx,
        dt_limit, return_final_states, activation, rmsnorm_weight, rmsnorm_eps, outproj_weight,
        outproj_bias, headdim, ngroups, norm_before_gate,
    )  # fmt: skip


class MambaSplitConv1dScanCombinedFn(torch.autograd.Function):
    """Keeps what upstream's keeps, in its order, and computes every gradient, as upstream does."""

    @staticmethod
    def forward(
        ctx: Any, zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor,
        A: Tensor, D: Tensor, chunk_size: int, initial_states: None = None,
        seq_idx: Tensor | None = None, dt_limit: Any = (0.0, float("inf")),
        return_final_states: bool = False, activation: str = "silu",
        rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
        headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
    ) -> Tensor:  # fmt: skip
        fused_calls.append("mamba_split_conv1d_scan_combined")
        weight, bias, norm, eps = conv1d_weight, conv1d_bias, rmsnorm_weight, rmsnorm_eps
        assert initial_states is None
        assert not return_final_states
        assert activation in ("silu", "swish")
        assert ngroups == 1
        mlp, out, z, _ = _ssd(zxbcdt, weight, bias, dt_bias, A, D, headdim, seq_idx, dt_limit)
        rstd = None
        if norm is None:
            y = (out.flatten(2) * F.silu(z)).to(zxbcdt.dtype)
        else:
            y, _, rstd = _layer_norm_fwd(out.flatten(2), norm, None, eps, z)
        y = torch.cat([mlp, y], dim=-1)
        if outproj_weight is not None:
            y = F.linear(y, outproj_weight, outproj_bias)
        else:
            assert outproj_bias is None
        ctx.save_for_backward(
            zxbcdt, weight, bias, out, A, D, dt_bias, initial_states, seq_idx, norm, rstd,
            outproj_weight, outproj_bias,
        )  # fmt: skip
        ctx.rmsnorm_eps, ctx.ngroups, ctx.norm_before_gate = eps, ngroups, norm_before_gate
        ctx.headdim, ctx.dt_limit = headdim, dt_limit
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (zxbcdt, weight, bias, _, A, D, dt_bias, _, seq_idx, norm, _, outproj_weight,
         outproj_bias) = ctx.saved_tensors  # fmt: skip
        named = {
            0: zxbcdt, 1: weight, 2: bias, 3: dt_bias, 4: A, 5: D, 12: norm, 14: outproj_weight,
            15: outproj_bias,
        }  # fmt: skip
        leaves = {i: t.detach().clone().requires_grad_() for i, t in named.items() if t is not None}
        with torch.enable_grad():
            operands = (leaves[i] for i in range(6))
            mlp, out, z, _ = _ssd(*operands, ctx.headdim, seq_idx, ctx.dt_limit)
            if mlp.shape[-1] and outproj_weight is None:
                raise UnboundLocalError("out0_recompute")
            if norm is None:
                y = (out.flatten(2) * F.silu(z)).to(zxbcdt.dtype)
            else:
                y = _layer_norm_fwd(out.flatten(2), leaves[12], None, ctx.rmsnorm_eps, z)[0]
            y = torch.cat([mlp, y], dim=-1)
            if outproj_weight is not None:
                y = F.linear(y, leaves[14], leaves.get(15))
            gradients = torch.autograd.grad(y, list(leaves.values()), dy)
        found = dict(zip(leaves, gradients, strict=True))
        return tuple(found.get(i) for i in range(19))


def _unfused(mixer: Any, zxbcdt: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    mlp, y, z, state = _ssd(
        zxbcdt, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias,
        -torch.exp(mixer.A_log), mixer.D, mixer.headdim, seq_idx,
    )  # fmt: skip
    y = y.flatten(2)
    y = mixer.norm(y, z) if mixer.rmsnorm else (y * F.silu(z)).to(y.dtype)
    return torch.cat([mlp, y], dim=-1), state


def _ssd(
    zxbcdt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    headdim: int, seq_idx: Tensor | None, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gated MLP's output, the scan's [b, l, heads, headdim], its gate z, the last state."""
    heads = A.shape[0]
    inner = heads * headdim
    state_size = (weight.shape[0] - inner) // 2
    mlp = (zxbcdt.shape[-1] - 2 * inner - 2 * state_size - heads) // 2
    z0, x0, z, xbc, dt = zxbcdt.split([mlp, mlp, inner, inner + 2 * state_size, heads], dim=-1)
    xbc = cuda_stand_ins.conv(xbc.mT, weight, bias, seq_idx).mT
    x, B, C = xbc.split([inner, state_size, state_size], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    state = x.new_zeros(x.shape[0], heads, headdim, state_size)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        outputs.append((state * C[:, t, None, None]).sum(-1))
    y = (torch.stack(outputs, dim=1) + x * D[:, None]).to(zxbcdt.dtype)
    return F.silu(z0) * x0, y, z, state


class Model(nn.Module):
    """A residual stack of mixers between an embedding and a head, decoding token by token."""

    def __init__(self, mixer: type[nn.Module], depth: int = 2, width: int = 8, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList()
        for index in range(depth):
            indexed = {} if mixer is Mamba2Simple else {"layer_idx": index}
            layer = nn.Module()
            layer.mixer = mixer(width, **indexed, **options)
            self.layers.append(layer)
        self.head = nn.Linear(width, 11, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer.mixer(F.layer_norm(x, x.shape[-1:]), **kwargs)
        return self.head(x)


def inference_params() -> Any:
    """An empty cache, as upstream's ``InferenceParams``."""
    return SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
