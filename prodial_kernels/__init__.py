"""ProDiaL adapters for Mamba projectors, without materialising the adapted weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prodial_kernels._version import __version__

if TYPE_CHECKING:
    from prodial_kernels.captured import capture
    from prodial_kernels.checkpoint import load_adapter, save_adapter
    from prodial_kernels.config import ProdialConfig
    from prodial_kernels.functional import prodial_linear
    from prodial_kernels.linear import ProdialLinear, adapter_disabled
    from prodial_kernels.methods import (
        AdditionalScan,
        AffixTuning,
        BitFit,
        Full,
        LinearProbe,
        Lora,
        ParallelAdapter,
        PartialLora,
        PartialTuning,
        PromptTuning,
    )
    from prodial_kernels.models.adapt.inject import (
        apply_methods,
        apply_prodial,
        merge_prodial,
        merge_quantized,
        remove_prodial,
    )
    from prodial_kernels.models.adapt.several import (
        active_adapter,
        add_adapter,
        add_weighted_adapter,
        delete_adapter,
        list_adapters,
        set_adapter,
        using_adapter,
    )
    from prodial_kernels.models.layers.fused_norms import fuse_norms
    from prodial_kernels.models.vision_mamba import VisionMamba
    from prodial_kernels.ops.implementation import resolve_impl
    from prodial_kernels.quantization import (
        QuantizedLinear,
        load_quantized,
        quantize_linear,
        quantize_model,
    )
    from prodial_kernels.training.memory.for_model import plan
    from prodial_kernels.training.step.model_loss import chunk_loss
    from prodial_kernels.training.step.optimizers import adapter_parameter_groups

__all__ = [
    "AdditionalScan",
    "AffixTuning",
    "BitFit",
    "Full",
    "LinearProbe",
    "Lora",
    "ParallelAdapter",
    "PartialLora",
    "PartialTuning",
    "ProdialConfig",
    "ProdialLinear",
    "PromptTuning",
    "QuantizedLinear",
    "VisionMamba",
    "__version__",
    "active_adapter",
    "adapter_disabled",
    "adapter_parameter_groups",
    "add_adapter",
    "add_weighted_adapter",
    "apply_methods",
    "apply_prodial",
    "capture",
    "chunk_loss",
    "delete_adapter",
    "fuse_norms",
    "list_adapters",
    "load_adapter",
    "load_quantized",
    "merge_prodial",
    "merge_quantized",
    "plan",
    "prodial_linear",
    "quantize_linear",
    "quantize_model",
    "remove_prodial",
    "resolve_impl",
    "save_adapter",
    "set_adapter",
    "using_adapter",
]

_HOMES = {
    "AdditionalScan": "methods",
    "AffixTuning": "methods",
    "BitFit": "methods",
    "Full": "methods",
    "LinearProbe": "methods",
    "Lora": "methods",
    "ParallelAdapter": "methods",
    "PartialLora": "methods",
    "PartialTuning": "methods",
    "PromptTuning": "methods",
    "ProdialConfig": "config",
    "ProdialLinear": "linear",
    "QuantizedLinear": "quantization",
    "VisionMamba": "models.vision_mamba",
    "active_adapter": "models.adapt.several",
    "adapter_disabled": "linear",
    "adapter_parameter_groups": "training.step.optimizers",
    "add_adapter": "models.adapt.several",
    "add_weighted_adapter": "models.adapt.several",
    "apply_methods": "models.adapt.inject",
    "apply_prodial": "models.adapt.inject",
    "capture": "captured",
    "chunk_loss": "training.step.model_loss",
    "delete_adapter": "models.adapt.several",
    "fuse_norms": "models.layers.fused_norms",
    "list_adapters": "models.adapt.several",
    "load_adapter": "checkpoint",
    "load_quantized": "quantization",
    "merge_prodial": "models.adapt.inject",
    "merge_quantized": "models.adapt.inject",
    "plan": "training.memory.for_model",
    "prodial_linear": "functional",
    "quantize_linear": "quantization",
    "quantize_model": "quantization",
    "remove_prodial": "models.adapt.inject",
    "resolve_impl": "ops.implementation",
    "save_adapter": "checkpoint",
    "set_adapter": "models.adapt.several",
    "using_adapter": "models.adapt.several",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``prodial --help`` must not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
