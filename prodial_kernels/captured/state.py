"""The modules, tensors and options of a block when it was captured, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from prodial_kernels.captured.leaves import Held
from prodial_kernels.linear import BESIDE, OFFSETS_OFF

_PLAIN = (Tensor, nn.Parameter)
_requires_grad = attrgetter("requires_grad")
# Attributes that choose what a module computes, here and in PEFT.
_OPTIONS = (
    "training", "adapter_enabled", "_disable_adapters", "_active_adapter", "scaling", "impl",
    "lora_dropout", "lora_alpha", "p", "prodial_recompute_xz", "prodial_keep_output",
)  # fmt: skip


class BlockState:
    """The modules, tensors and options of a block; its graph is valid while they stay the same.

    Values may change in place, since a graph reads them from memory.
    """

    def __init__(self, block: nn.Module) -> None:
        """Remember the state of ``block``."""
        self._modules = list(block.modules())
        self._classes = [*map(type, self._modules)]
        # Compared in every call of the block, so in few Python steps.
        self._held: list[dict[str, Any]] = [
            held for m in self._modules for held in (m._modules, m._parameters, m._buffers)
        ]
        self._values = [value for held in self._held for value in held.values()]
        self._identities = [*map(id, self._values)]
        options = [
            (vars(m), name, value) for m in self._modules for name, value in _options(m).items()
        ]
        self._owners = [owner for owner, _, _ in options]
        self._names = [name for _, name, _ in options]
        self._chosen = [value for _, _, value in options]
        self._tensors: list[Tensor] = [v for v in self._values if type(v) in _PLAIN]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._trained = [tensor.requires_grad for tensor in self._tensors]
        trained = {id(t): t for t in self._tensors if t.requires_grad}
        self.parameters = [*trained.values()]
        """The tensors that are trained, each once, in order."""

    def held(self, numbers: Mapping[int, int]) -> list[Held]:
        """Where the modules hold parameters; ``numbers`` has each one's, by its ``id``."""
        return [
            Held(place, name, numbers[id(value)])
            for place in self._held
            for name, value in place.items()
            if id(value) in numbers
        ]

    def change(self) -> str | None:
        """Say what has changed since; None if nothing has."""
        if [*map(type, self._modules)] != self._classes:
            return "the class of a module was changed"
        if [*map(id, chain.from_iterable(map(dict.values, self._held)))] != self._identities:
            return "a module or a tensor was replaced, added or removed"
        found = [*map(dict.get, self._owners, self._names)]
        if found != self._chosen:
            for value, name, before in zip(found, self._names, self._chosen, strict=True):
                if value != before:
                    return f"{name} of a module is {value!r}, not {before!r}"
        if [*map(Tensor.data_ptr, self._tensors)] != self._places:
            return "a tensor was moved in memory"
        if [*map(_requires_grad, self._tensors)] != self._trained:
            return "requires_grad of a tensor was changed"
        return None


def _options(module: nn.Module) -> dict[str, Any]:
    found = vars(module)
    options = {name: found[name] for name in _OPTIONS if name in found}
    if any(name.startswith(BESIDE) for name in module._parameters):
        # There only while what is trained beside is switched off.
        options[OFFSETS_OFF] = found.get(OFFSETS_OFF)
    # Copies, since lists are changed in place.
    return {
        name: type(value)(value) if isinstance(value, list | dict) else value
        for name, value in options.items()
    }


def sharded(model: nn.Module) -> bool:
    """Whether some parameter is not a plain tensor on one device."""
    # FSDP's first kind keeps plain parameters, and DeepSpeed's ZeRO marks them.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return True
    return any(
        p.is_meta or hasattr(p, "ds_id") or (type(p) not in _PLAIN and hasattr(p, "full_tensor"))
        for p in model.parameters()
    )
