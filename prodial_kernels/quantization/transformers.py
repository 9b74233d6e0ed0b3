"""This package's formats as a ``quantization_config`` of transformers.

Importing this module registers the method ``prodial`` with transformers; a program that loads a
checkpoint saved in it imports it too::

    from prodial_kernels.quantization.transformers import ProdialQuantConfig
    config = ProdialQuantConfig("nf4")
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)

transformers hands over one weight at a time, and each is quantised as it comes: at no time is there
more than one dense weight of the layers that are to be quantised.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prodial_kernels._checks import check_choice
from prodial_kernels.module_tree import module_paths, place
from prodial_kernels.quantization.convert import FORMATS, from_state_dict, quantize_linear
from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.loading import unflattened
from prodial_kernels.quantization.model import find_layers
from prodial_kernels.quantization.names import METHOD
from prodial_kernels.quantization.saving import RESCALING

# The entries of a layer in a format, the plain weight last: a pattern matches within longer names.
_ENTRIES = {
    "nf4": (
        "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4", "weight",
    ),
    "int8": ("SCB", "weight_format", "weight"),
    "fp8": ("weight_scale_inv", "weight"),
}  # fmt: skip
_BYTES = {"nf4": 0.53, "int8": 1.0, "fp8": 1.0}


class ProdialQuantConfig(QuantizationConfigMixin):
    """``quantization_config`` of ``from_pretrained``: projectors in one of this package's formats.

    Attributes:
        format: ``"nf4"``, ``"int8"`` or ``"fp8"``, as for ``quantize_model``.
        target_modules: Names, or endings of dotted paths, of the linear layers to quantise.

    Raises:
        ValueError: An unknown format, or no names.
        TypeError: ``target_modules`` is no list of names, or an option that does not exist.
    """

    def __init__(
        self,
        format: str = "nf4",
        target_modules: Iterable[str] = ("in_proj", "out_proj"),
        quant_method: str = METHOD,
    ) -> None:
        check_choice("format", format, FORMATS)
        names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"target_modules must be a list of names, got {target_modules!r}")
        if not names:
            raise ValueError("target_modules must name at least one layer, got none")
        if "all" in names:
            raise ValueError(
                'target_modules="all" is not a quantization_config: embeddings and experts are no '
                "linear layers; load the model with prodial_kernels.load_quantized, or with "
                "prodial and --quantize-modules all"
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method = METHOD
        self.format = format
        self.target_modules = names


class ProdialQuantizer(HfQuantizer):
    """How transformers loads and saves a model whose projectors are ``QuantizedLinear``."""

    requires_calibration = False
    quantization_config: ProdialQuantConfig

    def __init__(self, quantization_config: ProdialQuantConfig, **kwargs: Any) -> None:
        """Made by ``from_pretrained``."""
        super().__init__(quantization_config, **kwargs)
        self._targets: dict[str, tuple[str, ...]] = {}

    # --- Loading. -------------------------------------------------------------------------------

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, scales included: what device maps are planned with."""
        return _BYTES[self.quantization_config.format]

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Find the layers, which stay plain ones on the meta device until their weights come."""
        found = find_layers(model, self.quantization_config.target_modules)
        self._targets = {path: paths for paths in found for path in paths}
        if not self.pre_quantized and _divides_when_loaded(model):
            raise ValueError(
                f"the configuration has {RESCALING}=True, by which transformers divides out_proj "
                "after it is loaded, which a quantised weight cannot be; load the model without "
                "quantization_config and call prodial_kernels.quantize_model on it"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether ``param_name`` is the weight of a layer to quantise."""
        path, dot, name = param_name.rpartition(".")
        return bool(dot) and name == "weight" and path in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        """Return what takes over a dense weight."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return what collects the entries of a layer that a checkpoint holds quantised."""
        if not self.pre_quantized:
            return []
        entries = [*_ENTRIES[self.quantization_config.format]]
        return [WeightConverter(entries, "weight", [_Deserialise(self)])]

    def take_over(self, model: nn.Module, path: str, layer: QuantizedLinear) -> None:
        """Put ``layer`` in the place of the plain one at ``path``, at all of its paths."""
        layer.train(model.get_submodule(path).training)
        # transformers' sign that nothing is to be initialised any more.
        vars(layer)["_is_hf_initialized"] = True
        place(model, self._targets[path], layer)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        dense = [path for path in self._targets if type(model.get_submodule(path)) is nn.Linear]
        if dense:
            raise ValueError(
                f"{dense[0]} and {len(dense) - 1} other layers to quantise have no weight in the "
                "checkpoint; it is not whole, or belongs to another class"
            )
        # A save writes the names that the layers have, and no conversion of this loading.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _is_ours(c)]
        return model

    # --- Saving and training. -------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the layers' entries, as ``from_pretrained`` reads them.

        Codes of a weight's own shape are written flat, and e4m3 ones as bytes. Where this module
        was not imported, transformers warns of the method and goes on: it must fail then, and not
        take the codes for a weight. Nor may it cast them (5.17 does).
        """
        state = model.state_dict()
        for path, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, QuantizedLinear):
                name = f"{path}.weight"
                if [*state[name].shape] == [layer.out_features, layer.in_features]:
                    codes = state[name].reshape(-1)
                    state[name] = codes.view(torch.uint8) if codes.is_floating_point() else codes
        return state, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: through the frozen weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes, as Trainer asks: it otherwise wants a PeftModel, where ``apply_prodial`` is none."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """``model.dequantize()``: plain layers with the weights that are stored."""
        for layer, paths in list(module_paths(model).items()):
            if isinstance(layer, QuantizedLinear):
                place(model, paths, layer.to_linear().to(dtype))
        return model


class _Quantize(ConversionOps):
    """Quantises one dense weight, and puts its layer into the model."""

    def __init__(self, hf_quantizer: ProdialQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: Mapping[str, Any], *_: Any, model: Any = None, missing_keys: Any = None,
        **__: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        for name, given in input_dict.items():
            weight = _one(given)
            path = name.rpartition(".")[0]
            linear = model.get_submodule(path)
            if weight.shape != linear.weight.shape:
                raise ValueError(
                    f"{name} has shape {list(weight.shape)} in the checkpoint, "
                    f"{list(linear.weight.shape)} in the model"
                )
            dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=False)
            layer = quantize_linear(dense, self.hf_quantizer.quantization_config.format)
            layer.bias = linear.bias
            self.hf_quantizer.take_over(model, path, layer)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


class _Deserialise(ConversionOps):
    """Makes a layer of the entries that a checkpoint holds of it."""

    def __init__(self, hf_quantizer: ProdialQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: Mapping[str, Any], *_: Any, model: Any = None,
        full_layer_name: str = "", missing_keys: Any = None, **__: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        entries = {name: _one(given) for name, given in input_dict.items()}
        path = full_layer_name.rpartition(".")[0]
        if not self.hf_quantizer.param_needs_quantization(model, full_layer_name):
            like = model.get_parameter_or_buffer(full_layer_name)
            weight = entries["weight"]
            # Nothing was cast on the way, since codes must not be.
            return {"weight": weight.to(like.dtype) if like.is_floating_point() else weight}
        linear = model.get_submodule(path)
        entries["weight"] = unflattened(entries["weight"], linear.weight)
        layer = from_state_dict(entries, dtype=linear.weight.dtype)
        if [layer.out_features, layer.in_features] != [*linear.weight.shape]:
            raise ValueError(
                f"{path}: the checkpoint holds {layer.extra_repr()}, the model has {linear}"
            )
        layer.bias = linear.bias
        self.hf_quantizer.take_over(model, path, layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def _divides_when_loaded(model: Any) -> bool:
    """Whether transformers divides ``out_proj`` of a model that it has just loaded.

    The ``_init_weights`` of Mamba and Mamba-2 does, whatever was loaded; Nemotron-H's does not.
    """
    code = inspect.unwrap(type(model)._init_weights).__code__
    return bool(getattr(model.config, RESCALING, False)) and "out_proj" in code.co_names


def _one(given: Any) -> Tensor:
    tensor: Tensor = given[0] if isinstance(given, list) else given
    return tensor


def _is_ours(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(isinstance(operation, _Deserialise) for operation in operations)


register_quantization_config(METHOD)(ProdialQuantConfig)
register_quantizer(METHOD)(ProdialQuantizer)
