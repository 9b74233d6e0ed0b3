"""What ProDiaL's kernels are measured against, one entry each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.projector.rivals import concat, peft, plain
from benchmarks.projector.rivals.layer import Layer
from prodial_kernels.testing import LinearCase

FLOOR, OURS, IN_FP8 = "frozen", "prodial", "prodial-fp8"
OURS_METHOD = "ProDiaL"


@dataclass(frozen=True)
class Rival:
    """One way to compute a method.

    Attributes:
        name: As printed and as ``--only`` takes it.
        method: The entry of ``rivals.methods.METHODS`` that it is checked against.
        prepare: Makes the layer from the case's operands.
        strong: Part of ``--quick``.
        requires: Module of an optional dependency.
        approximates: The method that its own stands for with coarser numbers, if there is one.
    """

    name: str
    method: str
    prepare: Callable[[LinearCase], Layer]
    strong: bool = False
    requires: str = ""
    approximates: str = ""

    def missing(self) -> str:
        """Why it cannot run here, or an empty string."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed (pip install '.[bench]')"
        return ""


RIVALS = (
    Rival(FLOOR, "frozen", plain.frozen, strong=True),
    Rival(OURS, OURS_METHOD, plain.ours, strong=True),
    Rival(IN_FP8, "ProDiaL in fp8", plain.ours_in_fp8, approximates=OURS_METHOD),
    Rival("concat", "ProDiaL", concat.concat, strong=True),
    Rival(
        "materialised-compiled", "ProDiaL", plain.adapted(plain.materialised, compiled=True),
        strong=True,
    ),
    Rival("materialised", "ProDiaL", plain.adapted(plain.materialised)),
    Rival("formula-compiled", "ProDiaL", plain.adapted(plain.formula, compiled=True)),
    Rival("formula", "ProDiaL", plain.adapted(plain.formula)),
    Rival("authors", "ProDiaL", plain.adapted(plain.authors)),
    Rival("lora-compiled", "LoRA", plain.lora_compiled),
    Rival("lora", "LoRA", plain.lora),
    Rival("peft-lora", "LoRA", peft.lora, requires="peft"),
    Rival("peft-dora", "DoRA", peft.dora, requires="peft"),
    Rival("peft-oft", "OFT", peft.oft, requires="peft"),
)  # fmt: skip


def select(names: Sequence[str] = (), *, strong: bool = False) -> tuple[Rival, ...]:
    """Return the rivals asked for; the floor is always among them.

    Raises:
        ValueError: An unknown name.
    """
    known = {rival.name: rival for rival in RIVALS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"only: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    if names:
        return tuple(rival for rival in RIVALS if rival.name in {FLOOR, *names})
    return tuple(rival for rival in RIVALS if rival.strong or not strong)
