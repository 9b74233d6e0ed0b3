"""The norms of transformers' models in one kernel each, instead of six forward and ten backward.

A norm there is written out in fp32: a copy of its input, a square, a mean, a product, a cast and
the weight, each over the whole tensor, and the copy is kept for backward. On CUDA
``torch.nn.functional.rms_norm`` does all of it in one kernel each way, rounds once, and keeps its
input as it came. The block around it stays transformers' own; but where its fp32 input is rounded
for the norm, the two gradients of that input are added in one pass instead of two.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.models.layers.blocks import (
    Calling,
    SetAttribute,
    has_separate_norm,
    plain_forward,
)
from prodial_kernels.models.mixers.arguments import split_first
from prodial_kernels.models.mixers.hf import recognises
from prodial_kernels.models.patch_point import AdaptedMixer, Changes, Undo, View
from prodial_kernels.ops.autocast import autocast_off

KERNEL_ON = ("cuda",)
"""Types of devices that have the kernel; on others PyTorch composes the same from small steps."""

# Attribute of a norm that runs fused.
_FUSED = "prodial_fused"
# What the families call the number under the root.
_EPSILONS = ("variance_epsilon", "eps")
# Dtypes of input and weight: those that occur where the kernel runs.
_COMPARED = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)


class FusedNorms(Changes):
    """Norms that run fused, until :meth:`remove`; prints as a line."""

    def __init__(
        self, count: int = 0, changes: Sequence[Undo] = (), refused: Sequence[str] = ()
    ) -> None:
        """Remember what to undo; made by :func:`fuse_norms`.

        Args:
            count: How many norms.
            changes: What was done to norms and blocks, in that order.
            refused: Names of modules that look like such a norm and compute something else.
        """
        super().__init__(changes)
        self._count = count
        self.refused = tuple(refused)

    def __len__(self) -> int:
        """How many norms were fused."""
        return self._count

    def __str__(self) -> str:
        text = f"norms: {len(self)} run as one kernel each"
        if self.refused:
            names = ", ".join(self.refused[:3]) + (", …" if len(self.refused) > 3 else "")
            text += f"; {len(self.refused)} of another formula are left as they are: {names}"
        return text


def fuse_norms(model: nn.Module) -> FusedNorms:
    """Let the RMS norms of a model of transformers run as one kernel, in training and evaluation.

    A norm is recognised by what it is, not by its name: a forward of transformers' that takes one
    tensor, a weight [d] and an epsilon, and nothing else; and by what it computes, which is
    compared with the fused function on a few random rows first. A weight that is a buffer must
    have no part in it, as in FalconMamba's norms of dt, B and C. Take it back before adapters are
    removed or merged.

    Args:
        model: Any module; it may be on ``meta``. Nothing changes in one of another library, or
            where the norms are fused already.

    Returns:
        What was done, and what undoes it.
    """
    norms = {name: m for name, m in model.named_modules() if _looks_like_one(m)}
    refused = [name for name, norm in norms.items() if not _computes_the_same(norm)]
    fused = [norm for name, norm in norms.items() if name not in refused]
    blocks = [m for m in model.modules() if has_separate_norm(m) and m.norm in fused]
    changes: list[Undo] = [SetAttribute(norm, _FUSED, True) for norm in fused]
    changes += [AdaptedMixer(norm, {"forward": fused_forward}) for norm in fused]
    changes += [AdaptedMixer(block, {"forward": joined_forward}) for block in blocks]
    return FusedNorms(len(fused), changes, refused)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a norm that :func:`fuse_norms` has changed."""
    return _FUSED in vars(module)


def fused_forward(norm: nn.Module, upstream: Any, *args: Any, **kwargs: Any) -> Tensor:
    """``norm(hidden_states)``, [..., d] -> [..., d], in one kernel.

    Where the weight is wider than the input, what dtype comes out is a matter of the class: its own
    forward runs.
    """
    hidden_states: Tensor = split_first(upstream, args, kwargs)[0]
    weight, dtype = norm._parameters.get("weight"), hidden_states.dtype
    if weight is not None and torch.promote_types(dtype, weight.dtype) != dtype:
        return upstream(norm, hidden_states)
    # Autocast would have it give fp32, which these norms do not.
    with autocast_off(hidden_states.device.type):
        return F.rms_norm(
            hidden_states, hidden_states.shape[-1:],
            None if weight is None else weight.to(dtype), _epsilon(norm),
        )  # fmt: skip


def joined_forward(block: nn.Module, upstream: Any, *args: Any, **kwargs: Any) -> Any:
    """``block(hidden_states, ...)``, which is a residual and is rounded for the norm, at once."""
    hidden_states, args, kwargs = split_first(upstream, args, kwargs)
    norm: Any = block.norm
    dtype = norm.weight.dtype
    # Whether transformers checkpoints the block has been decided outside; it may be a view here.
    forward = plain_forward(upstream)
    if (
        not (torch.is_grad_enabled() and hidden_states.requires_grad)
        or hidden_states.dtype == dtype
        or torch.compiler.is_compiling()
    ):
        return forward(block, hidden_states, *args, **kwargs)
    residual, rounded = _Rounded.apply(hidden_states, dtype)
    # The block reads the weight for its dtype, to round: with this one it has no need to.
    joined = Calling(norm, lambda _: norm(rounded), weight=residual)
    return forward(View(block, norm=joined), residual, *args, **kwargs)


class _Rounded(torch.autograd.Function):
    """x -> x itself, and x rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.to(dtype)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, drounded: Tensor) -> tuple[Tensor, None]:
        return torch.add(dx, drounded), None


def _looks_like_one(module: nn.Module) -> bool:
    # A forward of its own is a hook around that of its class, as accelerate sets one.
    if is_fused(module) or "forward" in vars(module) or not recognises(module):
        return False
    if _epsilon(module) is None:
        return False
    if {*module._parameters, *module._buffers} != {"weight"} or module._modules:
        return False
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    return len(inspect.signature(type(module).forward).parameters) == 2


def _computes_the_same(norm: nn.Module) -> bool:
    """Compare the two forwards on a few rows, down to ones that epsilon is larger than."""
    upstream: Any = type(norm).forward
    small = copy.copy(norm)
    # Whatever device a block of code around this makes tensors on.
    with torch.device("cpu"), torch.no_grad():
        drawn = torch.Generator().manual_seed(0)
        rows = torch.randn(4, 16, generator=drawn) * torch.tensor([[3.0], [1.0], [1e-2], [1e-4]])
        weight = torch.randn(16, generator=drawn)
        for dtype, stored in _COMPARED:
            x = rows.to(dtype)
            scale = nn.Parameter(weight.to(stored))
            small._parameters = {"weight": scale} if norm._parameters else {}
            small._buffers = {"weight": scale.detach()} if norm._buffers else {}
            expected, found = upstream(small, x), fused_forward(small, upstream, x)
            # Twice what each may round.
            tolerance = 4 * torch.finfo(dtype).eps
            if found.dtype != expected.dtype or not torch.allclose(
                found, expected, rtol=tolerance, atol=0.0
            ):
                return False
    return True


def _epsilon(norm: Any) -> float | None:
    found = (getattr(norm, name, None) for name in _EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)
