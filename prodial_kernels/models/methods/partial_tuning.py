"""Where the offsets of partial-tuning and of BitFit go in a model."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import partial

from torch import nn

from prodial_kernels.linear import OFFSET
from prodial_kernels.methods import BitFit, Method, PartialTuning
from prodial_kernels.models.methods.base import Site
from prodial_kernels.models.methods.offsets import Offsets, SsmParameter, ssm_parameters
from prodial_kernels.module_tree import module_paths

# Of the model: the parameters' own names.
_OF_MODEL = ("pos_embed", "cls_token")


def partial_tuning_sites(model: nn.Module, method: PartialTuning) -> list[Site]:
    """Plan the offsets; ValueError for a part that is in no mixer, or not in the model."""
    chosen: list[SsmParameter] = []
    for part in method.parts:
        found = _of_model(model, part) if part in _OF_MODEL else _of_mixers(model, part)
        if not found:
            there = sorted({p.part for p in ssm_parameters(model)})
            raise ValueError(
                f"partial-tuning: parts={part!r} is in no mixer of this model, nor a parameter of "
                f"it; its mixers have {', '.join(there) or 'none'}; take it out of parts"
            )
        chosen += found
    return _sites(chosen, method)


def bitfit_sites(
    model: nn.Module, method: BitFit, in_place: Container[int] = frozenset()
) -> list[Site]:
    """Plan an offset for every bias; ValueError where the model has none.

    A bias whose id is in ``in_place`` is trained as it is, by another method, and gets none.
    """
    chosen = [
        SsmParameter(f"{paths[0]}.{name}" if paths[0] else name, module, name, "bias")
        for module, paths in {model: ("",), **module_paths(model)}.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.is_floating_point()
        and name.endswith("bias")
        and id(parameter) not in in_place
    ]
    if not chosen:
        raise ValueError(f"bitfit: this {type(model).__name__} has no bias to train")
    return _sites(chosen, method)


def _of_mixers(model: nn.Module, part: str) -> list[SsmParameter]:
    if part not in ("conv1d", "conv1d_bias"):
        return ssm_parameters(model, [part])
    name = "bias" if part == "conv1d_bias" else "weight"
    return [found for found in ssm_parameters(model, ["conv1d"]) if found.name == name]


def _of_model(model: nn.Module, part: str) -> list[SsmParameter]:
    return [
        SsmParameter(f"{paths[0]}.{part}" if paths[0] else part, module, part, part)
        for module, paths in {model: ("",), **module_paths(model)}.items()
        if module._parameters.get(part) is not None
    ]


def _sites(chosen: Iterable[SsmParameter], method: Method) -> list[Site]:
    owners: dict[nn.Module, list[SsmParameter]] = {}
    for parameter in chosen:
        owners.setdefault(parameter.owner, []).append(parameter)
    return [
        Site(
            own[0].path.rpartition(".")[0],
            {OFFSET + p.name: tuple(p.value.shape) for p in own},
            partial(Offsets, owner, [p.name for p in own], method),
        )
        for owner, own in owners.items()
    ]
