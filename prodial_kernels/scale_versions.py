"""Versions of the stored scale: release 0.1.0 kept s, later releases keep s − 1."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

NEWEST = 2
KEPT_AS = "_prodial_scale_version"
"""Attribute of a layer that says how it keeps its scale; none is version 1."""


def unpickled(state: dict[str, Any]) -> dict[str, Any]:
    """Return a pickled layer's attributes in today's form; ValueError for a newer version."""
    refuse_newer("the pickled layer", state.get(KEPT_AS))
    scale = state["_parameters"].get("prodial_scale")
    if KEPT_AS not in state and scale is not None:
        scale.data = from_first_version(scale.data)
        state[KEPT_AS] = NEWEST
    return state


def refuse_newer(subject: str, version: int | None) -> None:
    """Raise ValueError where a state has a note of a version newer than this package knows."""
    if version is not None and version > NEWEST:
        raise ValueError(
            f"{subject} is of version {version}, and this release of prodial-kernels reads "
            f"versions 1 to {NEWEST}; install the release that wrote it, or a newer one"
        )


def from_first_version(scale: Tensor) -> Tensor:
    """Return s − 1 for a stored s, [out_features], in the same dtype; subtracted in fp32 or fp64.

    Exact for s in [0.5, 2]; what s itself had lost to its format is not found again.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (scale.to(wide) - 1).to(scale.dtype)


def scale_to_load(scale: Tensor, version: int | None) -> Tensor:
    """Return s − 1 for the scale of a state dict.

    Args:
        scale: [out_features], s or s − 1.
        version: Of the layer's state, which ``Module.state_dict`` notes; None where a file format
            or another library has dropped the note. Then the values are taken as they are, and a
            warning is given if they look like s: most of them nearer to 1 than to 0 or to 2.
    """
    if version == 1:
        return from_first_version(scale)
    if version is None and not scale.is_meta and looks_like_s(scale):
        warnings.warn(
            "the state dict's prodial_scale lies around 1, and says nothing of its version: this "
            "looks like s, which prodial-kernels 0.1.0 kept; since then s - 1 is kept, which lies "
            "around 0. If that version wrote it, subtract 1 from every prodial_scale before "
            "loading. It was loaded as it is",
            stacklevel=2,
        )
    return scale


def looks_like_s(scale: Tensor) -> bool:
    """Whether most values are nearer to 1 than to 0 and to 2."""
    if not scale.numel() or not scale.is_floating_point():
        return False
    near = (scale.detach().float() - 1).abs() < 0.5
    return bool(near.sum() * 2 > near.numel())
