"""MambaPEFT's methods on a whole model, in the mixers' blocks and as they are done elsewhere.

``<method>`` runs in this package's block, ``<method>-slow`` the same with the fast path off, as in
the authors' code: separate kernels, projections as modules, weights formed from their parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prodial_kernels import (
    AdditionalScan,
    AffixTuning,
    BitFit,
    Lora,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    ProdialConfig,
    PromptTuning,
    apply_methods,
    remove_prodial,
)

SLOW = "-slow"
METHODS: Mapping[str, Sequence[Any]] = {
    "lora-in-out": [Lora(("in_proj", "out_proj"))],
    "lora-x-dt": [Lora(("x_proj", "dt_proj"))],
    "lora-embed": [Lora(("embed",))],
    "lora-strong": [Lora(("in_proj", "out_proj", "x_proj", "embed"))],
    "partial-lora-x": [PartialLora(("X",))],
    "partial-lora-z": [PartialLora(("Z",))],
    "partial-lora-dbc": [PartialLora(("d", "B", "C"))],
    "parallel-adapter": [ParallelAdapter()],
    "partial-tuning": [PartialTuning(("A_log", "D", "dt_bias", "conv1d"))],
    "partial-tuning-conv": [PartialTuning(("conv1d",))],
    "additional-scan": [AdditionalScan(4)],
    "affix": [AffixTuning(3)],
    "prompt": [PromptTuning(8)],
    "bitfit": [BitFit()],
    "hybrid": [
        ProdialConfig(), AdditionalScan(4), PartialTuning(("A_log", "conv1d")), PartialLora(("X",))
    ],
}  # fmt: skip
"""Lists of methods by the names of variants."""
METHOD_VARIANTS = (*METHODS, *(f"{name}{SLOW}" for name in METHODS))


@contextmanager
def with_methods(model: nn.Module, mixers: Sequence[Any], variant: str) -> Iterator[None]:
    """Let the variant's methods train ``model``, a little way into training, and undo it."""
    apply_methods(model, METHODS[variant.removesuffix(SLOW)])
    switches = [mixer for mixer in mixers if hasattr(mixer, "use_fast_path")]
    before = [mixer.use_fast_path for mixer in switches]
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.002 * torch.randn_like(parameter))
        for mixer in switches:
            mixer.use_fast_path = not variant.endswith(SLOW)
        yield
    finally:
        for mixer, value in zip(switches, before, strict=True):
            mixer.use_fast_path = value
        remove_prodial(model)
