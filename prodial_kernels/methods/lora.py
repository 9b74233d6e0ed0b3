"""LoRA: W' = W + α B A, on chosen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels.methods.base import Method, option


@dataclass(frozen=True)
class Lora(Method):
    """A low-rank term added to weights; B starts at 0, so that W' = W.

    Attributes:
        targets: Names of linear layers, as a configuration's ``target_modules`` takes them, and
            ``"embed"`` for the embedding of tokens or of patches. Of a mixer that scans both ways,
            a name means both directions' layers.
        r: Rank.
        alpha: LoRA's numerator: α = alpha / r. Default: r.
        dropout: Dropout probability on the term's input in training mode, in [0, 1).
    """

    name: ClassVar[str] = "lora"

    targets: tuple[str, ...] = option(("in_proj", "out_proj"), "layers that get a low-rank term")
    r: int = option(16, "rank")
    alpha: float | None = option(None, "numerator of the term's factor alpha / r; default: r")
    dropout: float = option(0.0, "dropout on the term's input")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._freeze_names("targets")
        self._check_low_rank()
