"""``ProdialPeftLinear``: one frozen layer with any number of named ProDiaL adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
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


_NOT_FINITE = "the adapted weight W' of adapter {!r} has values that are not finite"


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

    def get(self: ProdialPeftLinear) -> nn.Parameter | None:
        name, factors = self.adapter_in_use, self.factors(attribute)
        return factors[name].weight if name is not None and name in factors else None

    return property(get)


class ProdialPeftLinear(ProdialLinear, BaseTunerLayer):
    """A :class:`ProdialLinear` whose tensors and options are those of the active adapter.

    Everything that the package does with an adapted layer, its kernels, its mixers' fused paths
    and its quantised weights, therefore holds for this one. At most one adapter is active: their
    effects multiply, and there is no sum of them (see ``ProdialTuner.add_weighted_adapter``).
    """

    adapter_layer_names = tuple(PARTS.values())
    other_param_names = ("_prodial_options",)

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
                model gets back by ``unload``. Its inputs may be in another dtype.
        """
        nn.Module.__init__(self)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        # In a tuple, so that it is no child: its tensors are those of base_layer.
        self.read_from = () if original is None else (original,)
        for attribute in PARTS.values():
            setattr(self, attribute, nn.ModuleDict())
        self._prodial_options: dict[str, dict[str, Any]] = {}
        self.merged_adapters: list[str] = []
        self._reading: str | None = None
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.register_buffer("_merged_weight", None, persistent=False)
        self.register_load_state_dict_post_hook(merge_again)
        self.train(base_layer.training)

    # --- Adapters. ------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: ProdialConfig) -> None:
        """Add an adapter at its initial values, where W' = W; it is not made active.

        Raises:
            ValueError: The layer has one of this name, or a block count does not divide
                ``in_features``.
        """
        if adapter_name in self._prodial_options:
            raise ValueError(f"this layer already has an adapter called {adapter_name!r}")
        target = next(iter(config.target_modules))
        made = ProdialLinear.from_config(self.base_layer, config, target)
        for name, parameter in made.adapter_parameters():
            self.factors(PARTS[name])[adapter_name] = Factor(parameter)
        self._prodial_options[adapter_name] = {
            name: value
            for name, value in vars(made).items()
            if not name.startswith("_") and name not in ("training", "adapter_enabled")
        }
        if len(self._prodial_options) == 1:
            self._use(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was active, PEFT chooses another one."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        super().delete_adapter(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active, and trainable but in ``inference_mode``; a merge stays.

        ValueError for more than one of the layer's adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_one_of(names)
        BaseTunerLayer.set_adapter(self, names, inference_mode)
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
        if self._reading is not None:
            return self._reading
        return next((n for n in self.active_names() if n in self._prodial_options), None)

    @property
    def adapter_enabled(self) -> bool:
        """Whether calls compute with an adapter, active or merged."""
        in_use = self.adapter_in_use is not None or self._merged_weight is not None
        return in_use and not self._disable_adapters

    @adapter_enabled.setter
    def adapter_enabled(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def factors(self, attribute: str) -> Any:
        """Return one part of every adapter, by its name: an ``nn.ModuleDict`` of factors."""
        return self._modules[attribute]

    def active_names(self) -> list[str]:
        """Return the adapters that PEFT made active, whether this layer has them or not."""
        names = self._active_adapter
        return [names] if isinstance(names, str) else list(names)

    @contextmanager
    def reading(self, adapter_name: str) -> Iterator[None]:
        """Give the layer the tensors and options of one adapter, active or not, meanwhile."""
        before = self._reading
        self._reading = adapter_name
        self._use(adapter_name)
        try:
            yield
        finally:
            self._reading = before
            self._use(self.adapter_in_use)

    def _use(self, adapter_name: str | None) -> None:
        if adapter_name is not None:
            self.__dict__.update(self._prodial_options[adapter_name])

    # --- Merging. -------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Cache W' of an adapter and use it in every call; the base weight stays as it is.

        Args:
            safe_merge: Whether to refuse a W' that is not finite.
            adapter_names: At most one of the layer's adapters; default: the active one.

        Raises:
            ValueError: Several adapters, another one is merged already, or W' is not finite.
        """
        names = self.active_names() if adapter_names is None else adapter_names
        if isinstance(names, str):
            raise TypeError(f"adapter_names must be a list of names, got {names!r}")
        name = self.check_one_of(names)
        if name is None:
            return
        if self.merged_adapters:
            if self.merged_adapters == [name]:
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
                return
            raise ValueError(
                f"adapter {self.merged_adapters[0]!r} is merged already, and ProDiaL adapters do "
                f"not add up; unmerge it before you merge {name!r}"
            )
        with self.reading(name):
            ProdialLinear.merge(self)
        if safe_merge and not _finite(self._merged_weight):
            ProdialLinear.unmerge(self)
            raise ValueError(_NOT_FINITE.format(name))
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
        ProdialLinear.unmerge(self)
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer to replace this one by: the original, or a dense one with W'.

        PEFT calls it; ``merge`` writes W' of the adapter named, of the merged one, or the active.
        """
        before = self.original_layer()
        if not merge:
            return before
        if adapter_names is None and self.merged_adapters:
            adapter_names = list(self.merged_adapters)
        name = self.check_one_of(self.active_names() if adapter_names is None else adapter_names)
        if name is None:
            return before
        with self.reading(name):
            plain = self.to_linear().requires_grad_(False)
        if safe_merge and not _finite(plain.weight):
            raise ValueError(_NOT_FINITE.format(name))
        return plain

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProdialPeftLinear:
        """Move or cast; a merged weight is formed anew, and factors keep their own width."""
        merged = list(self.merged_adapters)
        self.unmerge()
        nn.Module._apply(self, fn, recurse=recurse)
        if merged:
            self.merge(adapter_names=merged)
        return self


def _finite(weight: Tensor | None) -> bool:
    return weight is not None and bool(weight.isfinite().all())
