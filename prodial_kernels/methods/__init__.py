"""What methods of fine-tuning there are, and their options. Loads no PyTorch.

:mod:`prodial_kernels.models.methods` does what these ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prodial_kernels._checks import check_choice
from prodial_kernels.methods.additional_scan import AdditionalScan as AdditionalScan
from prodial_kernels.methods.affix_tuning import AffixTuning as AffixTuning
from prodial_kernels.methods.base import Method as Method
from prodial_kernels.methods.baselines import BitFit as BitFit
from prodial_kernels.methods.baselines import Full as Full
from prodial_kernels.methods.baselines import LinearProbe as LinearProbe
from prodial_kernels.methods.lora import Lora as Lora
from prodial_kernels.methods.parallel_adapter import ParallelAdapter as ParallelAdapter
from prodial_kernels.methods.partial_lora import PartialLora as PartialLora
from prodial_kernels.methods.partial_tuning import PartialTuning as PartialTuning
from prodial_kernels.methods.prompt_tuning import PromptTuning as PromptTuning

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Lora, PartialLora, ParallelAdapter, PartialTuning, AdditionalScan, AffixTuning,
        PromptTuning, BitFit, LinearProbe, Full
    )
}  # fmt: skip
"""Every method but ProDiaL, by its name in files and on the command line."""


def method_from_dict(values: Any) -> Method:
    """Build a method from its name and its options, as :meth:`Method.to_dict` gives them.

    Raises:
        ValueError: Not an object with a name, an unknown name or option, or a value out of range.
        TypeError: A value of the wrong kind.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ValueError(
            f"a method must be an object with a name, one of {', '.join(METHODS)}, got {values!r}"
        )
    check_choice("name of a method", values["name"], tuple(METHODS))
    return METHODS[values["name"]].from_dict(values)
