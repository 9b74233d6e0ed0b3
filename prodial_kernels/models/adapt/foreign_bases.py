"""Adapted layers on a base that another library quantised: their dtype, and merging them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from prodial_kernels.linear import ProdialLinear, adapted_layers
from prodial_kernels.models.adapt.named_layer import NamedProdialLinear
from prodial_kernels.quantization.foreign import is_foreign

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of configurations of transformers: the list of modules that are stored dense.
_DENSE_MODULES = ("llm_int8_skip_modules", "modules_to_not_convert")


def dtype_between_layers(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of hidden states, which that of the embeddings is; None without such.

    Quantised layers of other libraries take any, dense ones do not; and
    ``prepare_model_for_kbit_training`` makes it fp32, whatever the model was loaded in.
    """
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    dtype = getattr(getattr(embeddings, "weight", None), "dtype", None)
    return dtype if dtype in _DTYPES else None


def is_on_foreign_base(layer: ProdialLinear) -> bool:
    """Whether the layer was put in the place of another library's quantised one."""
    return isinstance(layer, NamedProdialLinear) and bool(layer.read_from)


def has_foreign_bases(model: nn.Module) -> bool:
    """Whether an adapted layer of ``model`` is on another library's."""
    return any(map(is_on_foreign_base, adapted_layers(model).values()))


def dense_between(model: nn.Module, layer: ProdialLinear, made: nn.Linear) -> nn.Linear:
    """Return ``made``, the merged ``layer``, in the dtype that ``model`` needs a dense one in."""
    if not is_on_foreign_base(layer):
        return made
    return made.to(dtype_between_layers(model) or made.weight.dtype)


def note_dense_layers(model: nn.Module) -> None:
    """Say in the configuration of a model that transformers quantised which layers are dense now.

    It is saved with the model; without this, dense weights would be read as codes.
    """
    quantization: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is None:
        return
    dense = [path for path, module in model.named_modules() if _is_dense(module)]
    known = [option for option in _DENSE_MODULES if hasattr(quantization, option)]
    for option in known:
        setattr(quantization, option, dense)
    # compressed-tensors' own configuration is within that of transformers.
    inner: Any = getattr(quantization, "quantization_config", None)
    if hasattr(inner, "ignore"):
        inner.ignore = list(dict.fromkeys((*(inner.ignore or ()), *dense)))
    elif not known:
        warnings.warn(
            f"a {type(quantization).__name__} cannot say which layers are dense, so what "
            "save_pretrained writes of this model does not load: save the adapter and use "
            "'prodial merge', which writes a dense model or, with --stored, a quantised one",
            stacklevel=4,
        )


def _is_dense(module: nn.Module) -> bool:
    # torchao leaves the class as it is, and puts a tensor of its own in the weight's place;
    # compressed-tensors does so too, and takes the weight away until the model is called.
    weight = module._parameters.get("weight")
    plain = type(module) is nn.Linear and type(weight) is nn.Parameter
    return plain and not is_foreign(module)
