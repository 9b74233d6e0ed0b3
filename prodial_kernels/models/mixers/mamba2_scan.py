"""Mamba-2's fused scan with the adapted ``out_proj`` in one autograd function.

Upstream's fused function can leave ``out_proj`` out, but then the projector after it keeps its
input, [b, l, E], which upstream's own path recomputes in backward. So forward and backward of
upstream's autograd function are called by hand here, and the projector's input is recomputed from
the tensors that function saves, by the same gated norm. The projector's output is kept instead
where the mixer's input is not. The first operands of ``in_proj``'s backward are prefetched beside
the projector's product and the scan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prodial_kernels import upstream as libraries
from prodial_kernels.kernels.projector.operands import (
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.linear import ProdialLinear
from prodial_kernels.models.mixers.projection import operands_of, placeholder
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.prefetch import Prefetch
from prodial_kernels.ops.projection import project, project_backward, takes_output

_OPERANDS = len(Operands._fields)
# Position of the projector's operands among the arguments of ScanAndProject, and of its scale.
_FIRST = 3
_SCALE = _FIRST + Operands._fields.index("scale_deviation")
# Number and positions of the tensors that upstream's autograd function saves; its attributes.
_KEPT, _ZXBCDT, _OUT, _NORM_WEIGHT = 13, 0, 3, 9
_NAMED = ("rmsnorm_eps", "ngroups", "norm_before_gate")
# Names beside upstream's function in its module: the autograd function and the gated norm.
_RULE, _NORM = "MambaSplitConv1dScanCombinedFn", "_layer_norm_fwd"


class Keeping(NamedTuple):
    """What is kept for backward, and what is done in it.

    Attributes:
        output: Keep [b, l, out_features] for the gradient of the projector's scale, which else
            costs its product once more.
        prefetch: Called in backward; returns what to start beside the projector's product and the
            scan, or None.
    """

    output: bool
    prefetch: Callable[[], Prefetch[Any] | None] | None = None


@cache
def difference(upstream: Any) -> str | None:
    """Say why :func:`scan_and_project` cannot take ``upstream``, or return None."""
    module = getattr(upstream, "__globals__", {})
    missing = [name for name in (_RULE, _NORM) if name not in module]
    if missing:
        return f"beside mamba_split_conv1d_scan_combined is no {missing[0]}"
    taken = [*inspect.signature(module[_RULE].forward).parameters][1:]
    if taken != [*inspect.signature(upstream).parameters]:
        return f"mamba_split_conv1d_scan_combined and its {_RULE} take different arguments"
    return None


def scan_and_project(
    upstream: Callable[..., Tensor],
    out_proj: nn.Linear | ProdialLinear,
    keeping: Keeping,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """``out_proj(upstream(*args, **kwargs))`` for mamba_ssm's fused function without ``out_proj``.

    ``upstream`` is ``mamba_split_conv1d_scan_combined``, beside its autograd function and norm, and
    is called with ``outproj_weight=None``; zxbcdt [b, l, ·] first -> [b, l, out_features].

    Raises:
        UpstreamError: Upstream's autograd function saves other tensors than in mamba_ssm 2.3, which
            :func:`difference` cannot see.
    """
    bound = inspect.signature(upstream).bind(*args, **kwargs)
    bound.apply_defaults()
    zxbcdt = bound.args[0]
    operands, options = operands_of(out_proj, placeholder(zxbcdt, out_proj.in_features))
    return ScanAndProject.apply(upstream.__globals__, options, keeping, *operands, *bound.args)


class ScanAndProject(torch.autograd.Function):
    """Keeps the tensors that upstream's autograd function saves, and the projector's adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        module: dict[str, Any],
        options: ProjectionOptions,
        keeping: Keeping,
        *inputs: Any,
    ) -> Tensor:
        """``inputs``: the projector's ``Operands``, then upstream's arguments."""
        operands, arguments = Operands(*inputs[:_OPERANDS]), inputs[_OPERANDS:]
        kept = _Kept()
        y = module[_RULE].forward(kept, *arguments)
        saved = kept.saved_tensors
        if (
            len(saved) != _KEPT
            or saved[_ZXBCDT] is not arguments[0]
            or saved[_OUT].ndim != 4
            or not all(hasattr(kept, name) for name in _NAMED)
        ):
            raise libraries.error(
                "mamba_ssm",
                "mamba_split_conv1d_scan_combined of this mamba_ssm keeps other tensors than that "
                "of mamba_ssm 2.3, from which out_proj's input is made again; set "
                "use_mem_eff_path=False on the mixer, or install mamba_ssm 2.3",
            )
        with autocast_off(y.device.type):
            output, h = project(y.to(operands.weight.dtype), operands, options)
        keeps = keeping.output and takes_output(operands, options) and ctx.needs_input_grad[_SCALE]
        ctx.save_for_backward(output if keeps else None, h, *operands, *saved)
        kept.saved_tensors = ()
        ctx.module, ctx.options, ctx.kept = module, options, kept
        ctx.prefetch = keeping.prefetch
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        output, h, *tensors = ctx.saved_tensors
        operands, saved = Operands(*tensors[:_OPERANDS]), tuple(tensors[_OPERANDS:])
        own = ctx.needs_input_grad[_FIRST : _FIRST + _OPERANDS - 1]
        below = ctx.needs_input_grad[_FIRST + _OPERANDS :]
        needs = Needs(any(below), *own)
        prefetch = ctx.prefetch() if ctx.prefetch is not None and below[0] else None
        with autocast_off(dy.device.type):
            x = None
            if needs.input:
                x = _out_proj_input(ctx.module, ctx.kept, saved).to(operands.weight.dtype)
            dx, *adapter = project_backward(dy, x, Kept(output, h), operands, ctx.options, needs)
            # Of a block that has run again, the output has no other owner.
            del x, output
        through: tuple[Tensor | None, ...] = (None,) * len(below)
        if dx is not None:
            if prefetch is not None:
                prefetch.start()
            ctx.kept.saved_tensors = saved
            rule = ctx.module[_RULE]
            through = rule.backward(ctx.kept, dx.to(saved[_OUT].dtype))
            ctx.kept.saved_tensors = ()
        wanted = (g if need else None for g, need in zip(through, below, strict=True))
        return None, None, None, *adapter, None, *wanted


class _Kept:
    """The ``ctx`` of upstream's autograd function, which is called by hand."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


def _out_proj_input(module: dict[str, Any], kept: Any, saved: tuple[Any, ...]) -> Tensor:
    """Recompute the scan's output after gate and norm, [b, l, E], as upstream's forward did."""
    zxbcdt, out, weight = saved[_ZXBCDT], saved[_OUT].flatten(2), saved[_NORM_WEIGHT]
    width = out.shape[2]
    z = zxbcdt[..., :width]
    if weight is None:
        return F.silu(z).mul_(out)
    normed, *_ = module[_NORM](
        out.flatten(0, 1), weight, None, kept.rmsnorm_eps, z.flatten(0, 1),
        group_size=width // kept.ngroups, norm_before_gate=kept.norm_before_gate,
        is_rms_norm=True,
    )  # fmt: skip
    return normed.view_as(out)
