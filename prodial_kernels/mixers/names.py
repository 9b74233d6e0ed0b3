"""A model's tensors by the names they have where nothing is wrapped and nothing adapted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from prodial_kernels.linear import ADAPTER_PARAMETERS, ProdialLinear
from prodial_kernels.quantization import QuantizedLinear

_BASE = ".base_layer."
# Children that torch.compile and activation checkpointing put between a module and its parent.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s, ``DataParallel``'s or DDP's wrapper, or itself.

    These hold the module whole. ``FullyShardedDataParallel`` does not, so it stays.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def plain_path(path: str) -> str:
    """Return a dotted path without the children that wrappers within a model add."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every ProDiaL parameter by its plain name; of a layer at several places, the first."""
    return {
        f"{plain_path(path)}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, ProdialLinear)
        for name, parameter in module.adapter_parameters()
    }


def base_state(model: nn.Module) -> dict[str, object]:
    """Return ``state_dict`` without the adapter, by the names that the plain model has.

    Tensors are the model's own, parameters as parameters; a tied one is there under every name.
    The weight of a quantised layer is there as the layer, in the place of the tensors it is stored
    in: what counts is the weight that they stand for.
    """
    quantised = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear)
    }
    adapted = {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ProdialLinear)
    }
    state: dict[str, object] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        parent, _, own = name.rpartition(".")
        if own in ADAPTER_PARAMETERS and parent in adapted:
            continue
        if own != "bias" and (path := _within(name, quantised)) is not None:
            name, value = f"{path}.weight" if path else "weight", quantised[path]
        state[plain_path(_without_base_layer(name, adapted))] = value
    return state


def _within(name: str, paths: Mapping[str, object]) -> str | None:
    """The path among ``paths`` that a tensor's name begins with."""
    end = name.rfind(".")
    while end >= 0:
        if name[:end] in paths:
            return name[:end]
        end = name.rfind(".", 0, end)
    return "" if "" in paths else None


def _without_base_layer(name: str, adapted: set[str]) -> str:
    start = name.find(_BASE)
    while start >= 0:
        if name[:start] in adapted:
            return f"{name[:start]}.{name[start + len(_BASE) :]}"
        start = name.find(_BASE, start + 1)
    return name
