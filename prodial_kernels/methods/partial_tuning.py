"""Partial-tuning: a mixer's own parameters, moved from their pretrained values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels.methods.base import Method, option

PARTS = ("A_log", "D", "dt_bias", "conv1d", "conv1d_bias", "pos_embed", "cls_token")


@dataclass(frozen=True)
class PartialTuning(Method):
    """An offset of 0 at first, added to chosen parameters; weight decay pulls it back to 0.

    Attributes:
        parts: Of every mixer ``"A_log"``, ``"D"``, ``"dt_bias"`` (the step size's bias, whatever a
            family calls it), ``"conv1d"`` (the convolution's weight) and ``"conv1d_bias"``; of the
            model ``"pos_embed"`` and ``"cls_token"``, Vision Mamba's position embedding and class
            token.
    """

    name: ClassVar[str] = "partial-tuning"

    parts: tuple[str, ...] = option(
        ("conv1d",), "parameters to train as offsets from their pretrained values", choices=PARTS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._freeze_names("parts", PARTS)
