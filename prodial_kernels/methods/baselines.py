"""What methods are compared with: biases alone, the head alone, everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels.methods.base import Method, option


@dataclass(frozen=True)
class BitFit(Method):
    """Every bias of the model, as an offset of 0 at first."""

    name: ClassVar[str] = "bitfit"


@dataclass(frozen=True)
class LinearProbe(Method):
    """The head alone, trained as it is.

    Attributes:
        head: Names of modules; default: the model's output layer.
    """

    name: ClassVar[str] = "linear-probe"

    head: tuple[str, ...] = option((), "modules to train; default: the model's output layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head:
            self._freeze_names("head")
        else:
            object.__setattr__(self, "head", ())


@dataclass(frozen=True)
class Full(Method):
    """Every parameter of the model, trained as it is; it stands alone in its list."""

    name: ClassVar[str] = "full"
