"""ProDiaL adapters for Mamba projectors, without materialising the adapted weight."""

from prodial_kernels.config import ProdialConfig
from prodial_kernels.functional import prodial_linear, resolve_impl
from prodial_kernels.linear import ProdialLinear, adapter_disabled

__version__ = "0.1.0"

__all__ = [
    "ProdialConfig",
    "ProdialLinear",
    "__version__",
    "adapter_disabled",
    "prodial_linear",
    "resolve_impl",
]
