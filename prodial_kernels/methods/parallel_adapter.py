"""ParallelAdapter: a small network beside the output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels._checks import check_dropout, check_finite, check_integer
from prodial_kernels.methods.base import Method, option


@dataclass(frozen=True)
class ParallelAdapter(Method):
    """``scale · ReLU(h Aᵀ) Bᵀ`` from the input h of ``out_proj``, added to its output.

    B starts at 0. Its effect is no weight's: it cannot be merged into a plain model.

    Attributes:
        r: Width of the hidden layer.
        scale: Factor of the network's output.
        dropout: Dropout probability on the hidden layer in training mode, in [0, 1).
    """

    name: ClassVar[str] = "parallel-adapter"

    r: int = option(16, "width of its hidden layer")
    scale: float = option(1.0, "factor of its output")
    dropout: float = option(0.0, "dropout on its hidden layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("r", self.r, least=1)
        check_finite("scale", self.scale)
        object.__setattr__(self, "scale", float(self.scale))
        check_dropout(self.dropout)
