"""Initial values, drawn on the device of a run for a model that is somewhere else.

Every kind of device draws other numbers from the same seed. A model that is to be divided among
GPUs is adapted on the CPU, and begins with the values that it has in one piece on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

# Those of ``init`` are asked about themselves, not about what they call.
_IN_PLACE = {
    Tensor.uniform_, Tensor.normal_, init.uniform_, init.normal_, init.kaiming_uniform_,
}  # fmt: skip
_NEW = {torch.rand, torch.randn}


class DrawnOn(TorchFunctionMode):
    """Within it, new values are drawn on ``device``, wherever the tensors are that get them."""

    def __init__(self, device: torch.device) -> None:
        """Draw on ``device``."""
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Draw what is to be random, and compute everything else as it is."""
        kwargs = dict(kwargs or {})
        if function in _NEW:
            drawn = function(*args, **{**kwargs, "device": self._device})
            return drawn.to(kwargs.get("device") or "cpu")
        if function not in _IN_PLACE:
            return function(*args, **kwargs)
        # ``init`` gives all by name.
        tensor, *rest = args or (kwargs.pop("tensor"),)
        drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        tensor.detach().copy_(function(drawn, *rest, **kwargs))
        return tensor
