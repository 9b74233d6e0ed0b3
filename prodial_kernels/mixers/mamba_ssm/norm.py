"""Making a mixer's input again from what the norm before it keeps.

mamba_ssm's blocks run ``hidden, residual = layer_norm_fn(hidden, residual, prenorm=True)`` and then
the mixer. The norm keeps the residual sum for its own backward, so a mixer that needs its input in
backward can have it normalised once more instead of keeping a second copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MODULE = "mamba_ssm.ops.triton.layer_norm"


def normed_again(hidden: Tensor) -> Callable[[], Tensor] | None:
    """Return what makes ``hidden`` once more, bit by bit, while its graph is alive; else None.

    None unless ``hidden`` is the first result of mamba_ssm's fused norm, without dropout or a
    second branch, and of a residual sum in fp32: from a sum that was rounded after the norm read
    it, other values would come out. None also under hooks on saved tensors, as in checkpointing.

    Args:
        hidden: The mixer's input, [b, l, d].
    """
    node: Any = hidden.grad_fn
    rule = getattr(type(node), "_forward_cls", None)
    if (
        rule is None
        or (rule.__module__, rule.__name__) != (_MODULE, "LayerNormFn")
        or hidden.output_nr != 0
        or node.dropout_p != 0.0
        or node.has_x1
        or torch.compiler.is_compiling()
        or _saved_tensors_are_hooked()
    ):
        return None
    total_dtype = node._input_metadata[1].dtype if node.prenorm else node.x_dtype
    if node.has_residual and not (node.prenorm and total_dtype is torch.float32):
        return None
    forward = sys.modules[_MODULE].__dict__["_layer_norm_fwd"]
    dtype = hidden.dtype

    def again() -> Tensor:
        # Read from the node, which finds out whether anybody has changed them.
        total, weight, bias, _, _, rowscale, *_ = node.saved_tensors
        if rowscale is not None:
            raise RuntimeError(
                "the norm before this Mamba mixer scales rows, so its output cannot be made again "
                "from its sum; call layer_norm_fn without rowscale"
            )
        made = forward(total, weight, bias, node.eps, out_dtype=dtype, is_rms_norm=node.is_rms_norm)
        return made[0].reshape(node.x_shape_og)

    return again


def _saved_tensors_are_hooked() -> bool:
    """Whether something like checkpointing packs what is kept; it may unpack a tensor only once."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
