"""transformers' attention masks, made without waiting for the device.

To find out whether a row holds several documents, transformers looks at the positions that its
models have just counted up themselves, and waits for the device to do so; a step that waits cannot
be captured in a CUDA graph. Where a caller gives neither a mask nor positions, each row is one
text, so the answer is known; where it gives positions, the mask that keeps documents apart is
always right, one document included. While a graph is captured, transformers does not look, but then
makes a mask where none is needed, and attention takes a slower kernel than in the eager step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MODULE = "transformers.masking_utils"
_FIND, _TRACING = "find_packed_sequence_indices", "is_tracing"


@contextmanager
def masks_without_waiting(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Within, no mask of transformers waits for the device.

    Args:
        inputs: What the model is called with, beside ``input_ids``. With an ``attention_mask``
            nothing changes: whether it hides anything is on the device.
    """
    masks: Any = sys.modules.get(_MODULE)
    missing = masks is None or not all(hasattr(masks, name) for name in (_FIND, _TRACING))
    if missing or inputs.get("attention_mask") is not None:
        yield
        return
    find, tracing = getattr(masks, _FIND), getattr(masks, _TRACING)
    apart = inputs.get("position_ids") is not None

    def found(position_ids: Tensor) -> Tensor | None:
        if not apart:
            return None
        setattr(masks, _TRACING, lambda tensor=None: True)
        try:
            documents: Tensor | None = find(position_ids)
        finally:
            setattr(masks, _TRACING, traced)
        return documents

    def traced(tensor: Tensor | None = None) -> bool:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        # Only of a mask that is there could something have to be read.
        return bool(tracing(tensor)) and not (tensor is None and capturing)

    setattr(masks, _FIND, found)
    setattr(masks, _TRACING, traced)
    try:
        yield
    finally:
        setattr(masks, _FIND, find)
        setattr(masks, _TRACING, tracing)
