"""Recomputing a mixer's input from the tensors that the norm before it keeps.

mamba_ssm's blocks run ``hidden, residual = layer_norm_fn(hidden, residual, prenorm=True)`` and then
the mixer. The norm keeps the residual sum for its own backward, so a mixer that needs its input in
backward can apply the norm to that sum once more instead of keeping its own copy.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prodial_kernels import upstream

_MODULE = "mamba_ssm.ops.triton.layer_norm"
# Attributes read of the norm's node, the number of tensors it keeps, the row scale's position
# among them, and the arguments given to the function behind it.
_NODE = ("dropout_p", "has_x1", "prenorm", "x_dtype", "has_residual", "eps", "is_rms_norm",
         "x_shape_og", "_input_metadata", "_raw_saved_tensors")  # fmt: skip
_KEPT, _ROWSCALE = 9, 5
_TAKEN = ("x", "weight", "bias", "eps"), {"out_dtype", "is_rms_norm"}


def norm_recomputation(hidden: Tensor) -> Callable[[], Tensor] | None:
    """Return what recomputes a mixer's input [b, l, d] bit for bit while its graph lives, or None.

    None unless ``hidden`` is the first result of mamba_ssm's fused norm, without dropout or a
    second branch, over an fp32 residual sum: a sum that was rounded after the norm read it gives
    other values. None also under hooks on saved tensors, as in checkpointing, and in torch.compile,
    which sees no nodes of autograd.
    """
    if torch.compiler.is_compiling():
        return None
    node: Any = hidden.grad_fn
    rule = getattr(type(node), "_forward_cls", None)
    if (
        rule is None
        or (rule.__module__, rule.__name__) != (_MODULE, "LayerNormFn")
        or hidden.output_nr != 0
    ):
        return None
    problem = _difference(node)
    if problem is not None:
        upstream.warn("mamba_ssm", f"{problem}: a Mamba mixer keeps its input for backward")
        return None
    if node.dropout_p != 0.0 or node.has_x1 or _saved_tensors_are_hooked():
        return None
    total_dtype = node._input_metadata[1].dtype if node.prenorm else node.x_dtype
    if node.has_residual and not (node.prenorm and total_dtype is torch.float32):
        return None
    forward = sys.modules[_MODULE].__dict__["_layer_norm_fwd"]
    dtype = hidden.dtype

    def again() -> Tensor:
        # Read from the node, which checks that they have not been changed in place.
        total, weight, bias, *others = node.saved_tensors
        if others[_ROWSCALE - 3] is not None:
            raise RuntimeError(
                "the norm before this Mamba mixer scales rows, so its output cannot be made again "
                "from its sum; call layer_norm_fn without rowscale"
            )
        made = forward(total, weight, bias, node.eps, out_dtype=dtype, is_rms_norm=node.is_rms_norm)
        return made[0].reshape(node.x_shape_og)

    return again


def _difference(node: Any) -> str | None:
    """Say how the norm's node or its function differs from mamba_ssm 2.3's; None if it does not."""
    missing = [name for name in _NODE if not hasattr(node, name)]
    if missing:
        return f"LayerNormFn does not tell its {missing[0]}"
    # Not the tensors themselves, which hooks would unpack.
    if len(node._raw_saved_tensors) != _KEPT:
        return f"LayerNormFn keeps {len(node._raw_saved_tensors)} tensors and not {_KEPT}"
    return _difference_of_function(sys.modules[_MODULE].__dict__.get("_layer_norm_fwd"))


@cache
def _difference_of_function(function: Any) -> str | None:
    if function is None:
        return "LayerNormFn stands beside no _layer_norm_fwd"
    first, named = _TAKEN
    names = [*inspect.signature(function).parameters]
    if names[: len(first)] != [*first] or not named <= {*names}:
        return f"_layer_norm_fwd takes {', '.join(names)}"
    return None


# Private to torch. Without it, hooks are assumed, and the input is kept.
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _saved_tensors_are_hooked() -> bool:
    """Whether hooks, as of checkpointing, pack saved tensors; some unpack a tensor only once."""
    return _TOP_HOOKS is None or _TOP_HOOKS(True) is not None
