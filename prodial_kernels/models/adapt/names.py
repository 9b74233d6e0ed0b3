"""A model's tensors by the names they have in the plain model, neither wrapped nor adapted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.linear import ADAPTER_PARAMETERS, BESIDE, ProdialLinear, adapted_layers
from prodial_kernels.models.adapt.foreign_bases import dtype_between_layers
from prodial_kernels.models.adapt.named_layer import Factor
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.foreign import dense_values, from_foreign, is_foreign
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack

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


def without_peft(model: nn.Module) -> nn.Module:
    """Return the model in the wrappers that hold it whole, PEFT's ``PeftModel`` among them."""
    inner: Any = unwrapped(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    module: nn.Module = inner
    return module


def plain_path(path: str) -> str:
    """Return a dotted path without the children that wrappers within a model add."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the active adapter's tensors by plain names; of a layer at several places, the first.

    A name is ``<module path>.prodial_*``, whatever a layer with several adapters calls its tensors.
    """
    parameters = {
        f"{plain_path(path)}.{name}": parameter
        for path, layer in adapted_layers(model).items()
        for name, parameter in layer.adapter_parameters()
    }
    adapted = {plain_path(path) for path in adapted_layers(model)}
    for path, module in model.named_modules():
        base = _without_base_layer(f"{plain_path(path)}.", adapted) if path else ""
        for name, parameter in module._parameters.items():
            if name.startswith(BESIDE) and parameter is not None:
                parameters[base + name] = parameter
    return parameters


def base_state(model: nn.Module) -> dict[str, object]:
    """Return what ``state_dict`` holds, without the adapter, by the names of the plain model.

    Tensors are the model's own, parameters as parameters; a tied one is there under every name.
    The weight of a quantised layer is there as the layer, in the place of the tensors it is stored
    in: what counts is the weight that they stand for, whichever library's they are; of a mixture's
    experts, as the stack. Not read off ``state_dict``, which gives FSDP's shards even of a gathered
    model.
    """
    modules = [(plain_path(p), m) for p, m in model.named_modules(remove_duplicate=False)]
    adapted = {path for path, module in modules if isinstance(module, ProdialLinear)}
    state: dict[str, object] = {}
    dtype = dtype_between_layers(model)
    for path, module in modules:
        base = _without_base_layer(f"{path}.", adapted) if path else ""
        for name, value in _own_state(module, dtype).items():
            state[base + name] = value
    return state


def _own_state(module: nn.Module, dtype: torch.dtype | None) -> dict[str, object]:
    if isinstance(module, Factor):
        return {}
    stored = module
    if is_foreign(module):
        # What has no layout here is described by the tensors that it is stored in.
        with suppress(ValueError):
            stored = from_foreign(module, dtype)
    if isinstance(stored, QuantizedLinear):
        # From the registries: with an offset, the attribute is another tensor.
        bias = {**module._parameters, **module._buffers}.get("bias")
        if bias is None and stored is not module:
            # hqq's is an attribute.
            bias = stored.bias
        return {"weight": stored} if bias is None else {"weight": stored, "bias": bias}
    if isinstance(module, QuantizedEmbedding):
        return {"weight": vars(module)["table"]}
    if isinstance(module, QuantizedExperts):
        return {**module.stacks}
    if isinstance(module, QuantizedStack):
        return {}
    left_out: set[str] = set(module._non_persistent_buffers_set)
    left_out |= {name for name in module._parameters if name.startswith(BESIDE)}
    if isinstance(module, ProdialLinear):
        left_out |= set(ADAPTER_PARAMETERS)
    own: dict[str, object] = {**module._parameters, **module._buffers}
    state = {
        name: dense_values(value) if isinstance(value, Tensor) else value
        for name, value in own.items()
        if value is not None and name not in left_out
    }
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        state["_extra_state"] = module.get_extra_state()
    return state


def _without_base_layer(name: str, adapted: set[str]) -> str:
    start = name.find(_BASE)
    while start >= 0:
        if name[:start] in adapted:
            return f"{name[:start]}.{name[start + len(_BASE) :]}"
        start = name.find(_BASE, start + 1)
    return name
