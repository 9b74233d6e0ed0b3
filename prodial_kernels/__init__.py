"""ProDiaL adapters for Mamba projectors, without materialising the adapted weight."""

from prodial_kernels.checkpoint import load_adapter, save_adapter
from prodial_kernels.config import ProdialConfig
from prodial_kernels.functional import prodial_linear, resolve_impl
from prodial_kernels.linear import ProdialLinear, adapter_disabled
from prodial_kernels.mixers.inject import apply_prodial, merge_prodial, remove_prodial

__version__ = "0.1.0"

__all__ = [
    "ProdialConfig",
    "ProdialLinear",
    "__version__",
    "adapter_disabled",
    "apply_prodial",
    "load_adapter",
    "merge_prodial",
    "prodial_linear",
    "remove_prodial",
    "resolve_impl",
    "save_adapter",
]
