"""From the methods of a configuration to the places in a model, before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

from torch import nn

from prodial_kernels.methods import (
    AdditionalScan,
    AffixTuning,
    BitFit,
    Lora,
    Method,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    PromptTuning,
)
from prodial_kernels.models.methods.additional_scan import additional_scan_sites
from prodial_kernels.models.methods.affix_tuning import affix_tuning_sites
from prodial_kernels.models.methods.base import Site
from prodial_kernels.models.methods.baselines import trained_as_they_are
from prodial_kernels.models.methods.lora import lora_sites, partial_lora_sites
from prodial_kernels.models.methods.parallel_adapter import parallel_adapter_sites
from prodial_kernels.models.methods.partial_tuning import bitfit_sites, partial_tuning_sites
from prodial_kernels.models.methods.prompt_tuning import prompt_tuning_sites

# In the order of installation: each reads what the ones before it make of a parameter.
_SITES: dict[type[Method], Callable[[nn.Module, Any], list[Site]]] = {
    PartialTuning: partial_tuning_sites,
    BitFit: bitfit_sites,
    Lora: lora_sites,
    PartialLora: partial_lora_sites,
    AdditionalScan: additional_scan_sites,
    ParallelAdapter: parallel_adapter_sites,
    AffixTuning: affix_tuning_sites,
    PromptTuning: prompt_tuning_sites,
}

KEPT: frozenset[type[Method]] = frozenset({ParallelAdapter, AffixTuning, PromptTuning})
"""Methods whose effect is no parameter's, so that a plain model cannot have it."""


def kept_methods(methods: Iterable[Method]) -> list[str]:
    """Return the names of those that cannot be merged into a plain model."""
    return [method.name for method in methods if type(method) in KEPT]


def plan_methods(
    model: nn.Module, methods: Iterable[Method], adapted: Container[str] = ()
) -> list[Site]:
    """Return where the methods' tensors go in ``model``, in the order to install them.

    Args:
        model: The plain model.
        methods: What to plan; those that train the model's own parameters have no places.
        adapted: Paths of the layers that get an adapter of their own.

    Raises:
        ValueError: A method does not fit the model, or two train the same in the same place.
    """
    methods = list(methods)
    order = list(_SITES)
    known = [method for method in methods if type(method) in _SITES]
    in_place = {id(p) for method in methods for p in trained_as_they_are(model, method)}
    sites: list[Site] = []
    owners: dict[tuple[str, str], Method] = {}
    for method in sorted(known, key=lambda method: order.index(type(method))):
        found = _SITES[type(method)](model, method)
        if isinstance(method, BitFit):
            found = bitfit_sites(model, method, in_place)
        for site in found:
            for name in site.shapes:
                other = owners.setdefault((site.path, name), method)
                if other is not method:
                    raise ValueError(
                        f"the methods {other.name!r} and {method.name!r} train the same tensor of "
                        f"{site.path}; take it out of one of the two"
                    )
            if site.plain and site.path in adapted:
                raise ValueError(
                    f"{method.name}: {site.path} has a ProDiaL adapter, and the weight of that "
                    "layer has to stay one that is read: take it out of target_modules, and use "
                    "Lora(('x_proj',)) for a low-rank term on it"
                )
            sites.append(site)
    return sites


def planned_shapes(sites: Iterable[Site]) -> dict[str, list[int]]:
    """Return the shape of every tensor that sites add, by its name in the plain model."""
    return {
        f"{site.path}.{name}" if site.path else name: list(shape)
        for site in sites
        for name, shape in site.shapes.items()
    }
