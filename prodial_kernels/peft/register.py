"""Registering the method PRODIAL with the running PEFT: its enumeration and four mappings.

PEFT looks methods up by members of ``PeftType``, an enumeration that its versions before 0.21 test
for membership; no entry point adds one. So a member is made here, as ``enum`` makes them, and then
``register_peft_method``, which is public, does the rest.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

from prodial_kernels import upstream
from prodial_kernels.peft.available import PEFT_VERSION

NAME = "PRODIAL"
PREFIX = "prodial_"
"""How the names of an adapter's modules begin in a layer, and of its tensors in a file."""


def _member() -> PeftType:
    """Return ``PeftType.PRODIAL``, made if it is not there, or raise UpstreamError."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    known = (PeftType(NAME), PeftType[NAME], getattr(PeftType, NAME), list(PeftType)[-1])
    if any(found is not member for found in known):
        raise upstream.error("peft", f"its enumeration PeftType took no member {NAME}")
    return member


PEFT_TYPE = _member()


def register(config_class: Any, tuner_class: Any) -> None:
    """Tell PEFT which classes the name stands for; a second call does nothing.

    Raises:
        ValueError: PEFT has a method of this name already, by other classes.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    known = (PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE), PEFT_TYPE_TO_TUNER_MAPPING.get(PEFT_TYPE))
    if known == (config_class, tuner_class):
        return
    if known != (None, None):
        raise ValueError(
            f"PEFT {PEFT_VERSION} already has a method called {NAME}, by {known[0]}; "
            "prodial_kernels cannot register its own beside it"
        )
    register_peft_method(
        name=NAME.lower(), config_cls=config_class, model_cls=tuner_class, prefix=PREFIX
    )
