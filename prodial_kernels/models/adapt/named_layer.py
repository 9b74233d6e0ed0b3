"""``NamedProdialLinear``: one frozen layer with any number of named ProDiaL adapters.

The package's own functions (:mod:`.several`) and the method of PEFT put it into models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import ADAPTER_PARAMETERS, ProdialLinear, never_narrower, weight_like
from prodial_kernels.merged_weight import merge_again
from prodial_kernels.ops.autocast import autocast_dtype
from prodial_kernels.quantization import QuantizedLinear

PARTS = dict(
    zip(ADAPTER_PARAMETERS, ("prodial_D", "prodial_s", "prodial_A", "prodial_B"), strict=True)
)
"""The attribute that holds a part of every adapter, by the part's name in ``ProdialLinear``.

What PEFT, transformers and TRL do with names wants exactly LoRA's form: ``<prefix>X.<adapter>.
weight`` in a model, ``<prefix>X.weight`` in a file.
"""


class Factor(nn.Module):
    """One part of one adapter: ``weight``, kept at least as wide as it was made."""

    def __init__(self, weight: nn.Parameter) -> None:
        """Hold ``weight``."""
        super().__init__()
        self.weight = weight
        self.widest = weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factor:
        """Move or cast, but never narrow the dtype: 16 bits lose an optimiser's small updates."""
        super()._apply(never_narrower(fn, self.widest), recurse=recurse)
        return self


def _active_part(attribute: str) -> property:
    """Return a property: a part of the adapter in use, in the place of a parameter, or None."""

    def get(self: NamedProdialLinear) -> nn.Parameter | None:
        name, factors = self.adapter_in_use, self.factors(attribute)
        return factors[name].weight if name is not None and name in factors else None

    return property(get)


class NamedProdialLinear(ProdialLinear):
    """A :class:`ProdialLinear` whose tensors and options are those of the active adapter.

    Everything that the package does with an adapted layer, its kernels, its mixers' fused paths
    and its quantised weights, therefore holds for this one. At most one adapter is active: their
    effects multiply, and there is no sum of them (see :mod:`.combine` for where there is one).
    A layer without the active adapter computes as the pretrained one.
    """

    prodial_blocks, prodial_scale, prodial_a, prodial_b = map(_active_part, PARTS.values())

    def __init__(
        self,
        base_layer: nn.Linear | QuantizedLinear,
        original: nn.Module | None = None,
    ) -> None:
        """Wrap ``base_layer``, with no adapter yet.

        Args:
            base_layer: The frozen layer.
            original: The layer of another library that ``base_layer`` was read from: what the
                model gets back when the adapters are removed. Its inputs may be in another dtype.
        """
        nn.Module.__init__(self)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.register_buffer("_merged_weight", None, persistent=False)
        self.register_load_state_dict_post_hook(merge_again)
        self.train(base_layer.training)
        self._without_adapters(original)

    def _without_adapters(self, original: nn.Module | None = None) -> None:
        # In a tuple, so that it is no child: its tensors are those of base_layer.
        self.read_from = () if original is None else (original,)
        for attribute in PARTS.values():
            setattr(self, attribute, nn.ModuleDict())
        self._prodial_options: dict[str, dict[str, Any]] = {}
        self.merged_adapters: list[str] = []
        self._reading: str | None = None
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False

    # --- Adapters. ------------------------------------------------------------------------------

    def add_adapter(
        self, adapter_name: str, config: ProdialConfig, target: str | None = None
    ) -> None:
        """Add an adapter at its initial values, where W' = W; it is not made active.

        Args:
            adapter_name: Its name, which the layer has no other adapter of.
            config: The adapter.
            target: The one of ``config.target_modules`` that the layer matches; default: the first.

        Raises:
            ValueError: The layer has one of this name, or a block count does not divide
                ``in_features``.
        """
        if adapter_name in self._prodial_options:
            raise ValueError(f"this layer already has an adapter called {adapter_name!r}")
        target = next(iter(config.target_modules)) if target is None else target
        self._take(adapter_name, ProdialLinear.from_config(self.base_layer, config, target))

    def _take(self, adapter_name: str, layer: ProdialLinear) -> None:
        """Take over the tensors themselves and the options of a layer with one adapter."""
        for name, parameter in layer.adapter_parameters():
            self.factors(PARTS[name])[adapter_name] = Factor(parameter)
        self._prodial_options[adapter_name] = _options_of(layer)
        if len(self._prodial_options) == 1:
            self._use(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the merged weight if it was this one's; another one stays active.

        KeyError where the layer has none of that name.
        """
        if adapter_name in self.merged_adapters:
            self.unmerge()
        del self._prodial_options[adapter_name]
        for attribute in PARTS.values():
            if adapter_name in self.factors(attribute):
                del self.factors(attribute)[adapter_name]
        self._use(self.adapter_in_use)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter active, and the only one that trains; a merge stays."""
        self._active_adapter = adapter_name
        for attribute in PARTS.values():
            for name, factor in self.factors(attribute).items():
                factor.weight.requires_grad_(name == adapter_name)
        self._use(self.adapter_in_use)

    def check_one_of(self, adapter_names: Iterable[str]) -> str | None:
        """Return the one of these adapters that the layer has, or None; ValueError for several."""
        here = [name for name in adapter_names if name in self._prodial_options]
        if len(here) > 1:
            raise ValueError(
                f"one ProDiaL adapter can be active at a time, got {here}: each multiplies the "
                "weight, so they do not add up; train them as one, or combine what can be combined "
                "with add_weighted_adapter"
            )
        return here[0] if here else None

    @property
    def adapter_in_use(self) -> str | None:
        """Name of the adapter that calls compute with; None if the layer has no active one."""
        options = self._prodial_options
        if self._reading is not None:
            return self._reading if self._reading in options else None
        return next((name for name in self.active_names() if name in options), None)

    @property
    def adapter_enabled(self) -> bool:
        """Whether calls compute with an adapter, active or merged."""
        in_use = self.adapter_in_use is not None or self._merged_weight is not None
        return in_use and not self._disable_adapters

    @adapter_enabled.setter
    def adapter_enabled(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    @property
    def switched_on(self) -> bool:
        """What ``enable_adapter`` was last told, with an active adapter or without."""
        return not self._disable_adapters

    @property
    def adapter_names(self) -> list[str]:
        """Names of the layer's adapters, in the order in which they were added."""
        return [*self._prodial_options]

    def options_of(self, adapter_name: str) -> dict[str, Any]:
        """Return what :class:`ProdialLinear` has as attributes of one adapter, such as ``r``."""
        return self._prodial_options[adapter_name]

    def factors(self, attribute: str) -> Any:
        """Return one part of every adapter, by its name: an ``nn.ModuleDict`` of factors."""
        return self._modules[attribute]

    def active_names(self) -> list[str]:
        """Return the adapters that were made active, whether this layer has them or not."""
        names = self._active_adapter
        return [names] if isinstance(names, str) else list(names)

    @contextmanager
    def reading(self, adapter_name: str) -> Iterator[None]:
        """Give the layer the tensors and options of one adapter, active or not, meanwhile.

        None of them, as a layer without an active adapter, where it has none of that name.
        """
        before = self._reading
        self._reading = adapter_name
        self._use(self.adapter_in_use)
        try:
            yield
        finally:
            self._reading = before
            self._use(self.adapter_in_use)

    def _use(self, adapter_name: str | None) -> None:
        if adapter_name is not None:
            self.__dict__.update(self._prodial_options[adapter_name])

    # --- Merging. -------------------------------------------------------------------------------

    def merge(self) -> None:
        """Cache W' of the active adapter and use it in every call, as ``ProdialLinear.merge``.

        The merge stays when another adapter is made active. A layer without the active adapter
        stays as it is; ValueError where another one's W' is merged.
        """
        name = self.adapter_in_use
        if name is None or self.merged_adapters == [name]:
            return
        self.merge_one(name)

    def merge_one(self, name: str) -> None:
        """Cache W' of one of the layer's adapters; ValueError where another one's is cached."""
        if self.merged_adapters:
            raise ValueError(
                f"adapter {self.merged_adapters[0]!r} is merged already, and ProDiaL adapters do "
                f"not add up; unmerge it before you merge {name!r}"
            )
        with self.reading(name):
            super().renew_merged()
        self.merged_adapters = [name]

    def renew_merged(self) -> None:
        """Form the cached W' of the merged adapter anew if one of its tensors has changed."""
        if not self.merged_adapters:
            super().renew_merged()
            return
        with self.reading(self.merged_adapters[0]):
            super().renew_merged()

    def unmerge(self) -> None:
        """Drop the cached W'; calls use the active adapter again, bit for bit as before."""
        super().unmerge()
        self.merged_adapters = []

    def original_layer(self) -> nn.Module:
        """Return the layer that this one replaced, on the current device."""
        for original in self.read_from:
            return original.to(weight_like(self.base_layer).device)
        return self.base_layer

    # --- As a module. ---------------------------------------------------------------------------

    def forward(self, input: Tensor, channel_first: bool = False) -> Tensor:
        """[..., in_features] -> [..., out_features], as :meth:`ProdialLinear.forward`.

        Where the base layer was read from another library's, which takes inputs in any dtype, so
        does this one: computed in its own dtype, returned in that of the input.
        """
        dtype = weight_like(self.base_layer).dtype
        if self.read_from and input.dtype != dtype and autocast_dtype(input) is None:
            return super().forward(input.to(dtype), channel_first).to(input.dtype)
        return super().forward(input, channel_first)

    def extra_repr(self) -> str:
        """As :meth:`ProdialLinear.extra_repr`, with the adapters' names."""
        known = ", ".join(map(repr, self._prodial_options)) or "none"
        if self.adapter_in_use is None:
            return (
                f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, adapters={known}, none active"
            )
        return f"{super().extra_repr()}, adapters={known}, active={self.adapter_in_use!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NamedProdialLinear:
        """Move or cast; a merged weight is formed anew, and factors keep their own width."""
        merged = list(self.merged_adapters)
        self.unmerge()
        nn.Module._apply(self, fn, recurse=recurse)
        for name in merged:
            self.merge_one(name)
        return self


def give_name(layer: ProdialLinear, adapter_name: str) -> None:
    """Make a layer with one adapter a layer with named ones, in place; its adapter gets a name.

    The layer, its hooks and its tensors stay the same objects, so optimisers and whatever else
    holds them go on. A layer with names already is left as it is.
    """
    if isinstance(layer, NamedProdialLinear):
        return
    alone = _options_of(layer)
    parameters, enabled = dict(layer.adapter_parameters()), layer.adapter_enabled
    for name in ADAPTER_PARAMETERS:
        layer._parameters.pop(name, None)
    for name in ("adapter_enabled", *ADAPTER_PARAMETERS, *alone):
        vars(layer).pop(name, None)
    layer.__class__ = NamedProdialLinear
    named: Any = layer
    named._without_adapters()
    for name, parameter in parameters.items():
        named.factors(PARTS[name])[adapter_name] = Factor(parameter)
    named._prodial_options[adapter_name] = alone
    named._active_adapter = adapter_name
    named._use(adapter_name)
    named.adapter_enabled = enabled


def check_adapter_name(name: object) -> str:
    """Return ``name``, or raise ValueError for one that modules and files cannot be called by."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"an adapter's name must be letters, digits, '_' and '-', got {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"an adapter cannot be called {name!r}, which is a name of torch's ModuleDict; choose "
            f"another, such as {name + '_1'!r}"
        )
    return name


# What belongs to the layer and not to one of its adapters.
_OF_LAYER = frozenset(
    ("training", "adapter_enabled", "in_features", "out_features", *ADAPTER_PARAMETERS)
)


def _options_of(layer: ProdialLinear) -> dict[str, Any]:
    """Return the plain attributes of an adapted layer that are its adapter's."""
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith("_") and name not in _OF_LAYER
    }
