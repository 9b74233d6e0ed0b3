"""What autocast asks of the operation, on every device, also on those that have no autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once: not every supported torch.compile can trace the question.
_DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")
    if torch.amp.is_autocast_available(kind)
)


_NOTHING = nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts ``x`` to, as for ``F.linear``; None where it does not.

    It does not where autocast is off, for fp64, and on devices without it, such as meta.
    """
    kind = x.device.type
    if kind not in _DEVICES or not torch.is_autocast_enabled(kind):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off for a block: its casts would undo the dtypes chosen by hand."""
    if device_type not in _DEVICES or not torch.is_autocast_enabled(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)
