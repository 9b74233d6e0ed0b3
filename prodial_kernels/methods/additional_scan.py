"""Additional-scan: more state dimensions beside the pretrained ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prodial_kernels._checks import check_choice, check_integer
from prodial_kernels.methods.base import Method, option

POSITIONS = ("suffix", "prefix")
INITS = ("neighbours", "s4d")


@dataclass(frozen=True)
class AdditionalScan(Method):
    """k more state dimensions in every selective scan; the pretrained ones never see them.

    The new columns of A_log and rows of ``x_proj`` for B are trained as offsets from where they
    begin, to which weight decay pulls; the rows for C begin at 0, so that the model begins as the
    pretrained one while C has a gradient.

    Attributes:
        states: k.
        position: Whether the new states stand after (``"suffix"``) or before the pretrained ones.
        init: Where A_log begins: at the values of as many neighbouring states, or at those of S4D,
            log(n + 1), for n = N … N + k - 1. B begins at the neighbours' rows in both. Of one
            neighbour alone all copies would stay equal for ever.
    """

    name: ClassVar[str] = "additional-scan"

    states: int = option(4, "number of state dimensions to add")
    position: str = option("suffix", "where they stand", choices=POSITIONS)
    init: str = option("neighbours", "where A begins", choices=INITS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("states", self.states, least=1)
        check_choice("position", self.position, POSITIONS)
        check_choice("init", self.init, INITS)
