"""``ProdialPeftLinear``: a layer with named adapters as PEFT's operations on layers want it."""

from __future__ import annotations

import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prodial_kernels.models.adapt.named_layer import PARTS, NamedProdialLinear

_NOT_FINITE = "the adapted weight W' of adapter {!r} has values that are not finite"


class ProdialPeftLinear(NamedProdialLinear, BaseTunerLayer):
    """A :class:`NamedProdialLinear` whose adapters PEFT adds, switches, merges and deletes."""

    adapter_layer_names = tuple(PARTS.values())
    other_param_names = ("_prodial_options",)

    # --- Adapters. ------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was active, PEFT chooses another one."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        BaseTunerLayer.delete_adapter(self, adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active, and trainable but in ``inference_mode``; a merge stays.

        ValueError for more than one of the layer's adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_one_of(names)
        BaseTunerLayer.set_adapter(self, names, inference_mode)
        self._use(self.adapter_in_use)

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
        if self.merged_adapters == [name]:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self.merge_one(name)
        if safe_merge and not _finite(self._merged_weight):
            self.unmerge()
            raise ValueError(_NOT_FINITE.format(name))

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


def _finite(weight: Tensor | None) -> bool:
    return weight is not None and bool(weight.isfinite().all())
